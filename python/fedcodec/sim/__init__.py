"""A thin simulator of federated averaging: what a codec costs in accuracy and saves in bytes.

Needs the ``sim`` extra; nothing is imported here, so that looking at the settings does not load torch.
"""
