"""Packed, shared-prefix attention. In order of reading: plan, interface, then the kernels sdpa, tree, varlen, flex and
softmax."""
