"""torch.fx and nothing of quantization: capturing a model, matching chains, editing a graph, printing it."""
