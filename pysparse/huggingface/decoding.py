"""One switch for what a model computes beside its linear layers, token by token on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pysparse.huggingface.attention import has_attention, unknown_arguments, use_attention
from pysparse.huggingface.cache import make_room_
from pysparse.huggingface.registration import PREFIX
from pysparse.nn import fuse_norms_, fuse_rotary_
from pysparse.nn.mixin import check_module


@dataclass(frozen=True, slots=True)
class DecodingReport:
    """What runs on the compiled kernels now."""

    attention: (
        str  # the implementation's name; "" where the model's attention cannot be switched, or not to ours
    )
    norms: dict[str, str]  # path of each RMSNorm -> form, of ops.NORM_FORMS
    rotary: tuple[str, ...]  # modelling files whose rotary embedding is one call
    cache: bool  # whether a growing cache gets room ahead


def prepare_decoding_(model: nn.Module) -> DecodingReport:
    """Let all that ``model`` computes beside its linear layers run on the compiled kernels where it can, in place.

    That is attention (:func:`use_attention`; one of ours that was chosen before stays), RMSNorm
    (:func:`pysparse.nn.fuse_norms_`) and the rotary embedding (:func:`pysparse.nn.fuse_rotary_`, which holds for
    all models of that family in the process), for calls without gradients on the CPU in float32 or bfloat16. The
    layers themselves are :func:`pysparse.sparsify_`'s. And keys and values are written into room ahead instead of
    being copied for each token (:func:`pysparse.huggingface.cache.make_room_`).
    TypeError for what is no module.
    """
    check_module(model)
    config = getattr(model, "config", None)
    chosen = str(getattr(config, "_attn_implementation", None) or "")
    if not chosen.startswith(PREFIX) and has_attention(model) and not unknown_arguments(model):
        use_attention(model)
        chosen = str(getattr(config, "_attn_implementation", ""))
    return DecodingReport(
        chosen if chosen.startswith(PREFIX) else "",
        fuse_norms_(model),
        fuse_rotary_(model),
        make_room_(model),
    )
