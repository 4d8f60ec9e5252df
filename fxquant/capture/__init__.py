"""From a model as its author wrote it to graphs that compute the same; what cannot be traced stays as it is, between them.

Read ``capture`` first, then ``tracing``. ``proxies`` stand for tensors and sizes while forward runs, ``evaluation`` knows
their shapes, ``memory`` follows what is written in place, ``modes`` merges training and eval, ``guard_validation`` asks
whether other inputs would have gone another way, ``eager_recorder`` runs the model for real where nothing else will do.
"""
