"""Language models that run in PyTorch on the CPU: loading, watching inputs, replacing weights.

PyTorch and transformers are imported when they are needed (extra ``llm``), never before.
"""
