"""Which operations on a tensor that lies on a server are facts of its shape, and which may be written down and run there."""

from __future__ import annotations

from typing import Any

import torch


def _named(owner: Any, prefix: str, names: str) -> dict[Any, str]:
    return {getattr(owner, name): prefix + name for name in names.split()}


FACTS = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size, torch.Tensor.__len__,
    torch.Tensor.is_floating_point, torch.Tensor.stride, torch.is_floating_point, torch.numel, torch.is_tensor,
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__, torch.Tensor.is_sparse.__get__, torch.Tensor.is_mps.__get__,  # type: ignore[attr-defined]
    torch.Tensor.itemsize.__get__, torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    torch.Tensor.__hash__,
}  # fmt: skip

# What may be written down and run there: pure functions of tensors. Anything else fetches its arguments first.
RECORDED: dict[Any, str] = {
    **_named(
        torch.Tensor,
        "Tensor.",
        "__getitem__ reshape view expand expand_as clone transpose permute flatten unflatten unsqueeze squeeze repeat "
        "repeat_interleave contiguous detach to cpu float double half bfloat16 long mean sum std var norm add sub mul div "
        "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __matmul__ neg __neg__ pow __pow__ sqrt exp log "
        "tanh abs clamp gather scatter_add argmax max min cumsum softmax log_softmax __gt__ __lt__ __ge__ __le__ __eq__ "
        "__and__ __or__ gt lt ge le eq ne index_select new_zeros new_full masked_fill matmul __ne__ __invert__ scatter logsumexp "
        "topk amax amin any all",
    ),
    **_named(
        torch,
        "",
        "cat stack where log_softmax softmax einsum zeros_like ones_like logaddexp exp log sqrt tanh matmul mean sum "
        "gather argmax clamp index_select",
    ),
    torch.special.entr: "special.entr",
    torch.nn.functional.cosine_similarity: "nn.functional.cosine_similarity",
    torch.nn.functional.linear: "nn.functional.linear",
}
