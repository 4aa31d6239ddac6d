"""Pure functions of tensors and numbers, one room each: contract, reference, portable.

``reference`` is the specification: plain float32 torch, written to be read. ``portable`` is the fast
path in plain torch for any device, with its own backward where autograd would keep too much. Both have
the signature of the room's public function, and tests hold one to the other in values and gradients.
``native``, where a room has it, does passes over memory on the CPU by C kernels and is held to the same.
"""
