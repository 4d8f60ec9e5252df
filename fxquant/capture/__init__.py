"""From a model as its author wrote it to graphs that compute the same; what cannot be traced stays as it is, between them.

Read ``capture`` first. From there it goes one way: ``models`` makes the copy, ``filling`` decides what is made a graph,
``model_tracer`` makes one of a module (``one_graph``, with ``tracing``) until ``guard_validation`` finds no other input that
would have gone another way. ``proxies`` stand for tensors and sizes while forward runs, ``evaluation`` knows their shapes,
``memory`` follows what is written in place, ``modes`` merges training and eval, ``eager_recorder`` runs the model for real
where nothing else will do, and ``outside`` reads from it what code around a part does with it.
"""
