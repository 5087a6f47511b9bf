"""The process groups of a layout: Megatron's, checked against the positions that this engine computes itself."""

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from .layout import Layout, Place

_TIMEOUT_MINUTES = 30


def make_groups(layout: Layout, seed: int) -> Place:
    """Make Megatron's process groups and random states, for this process, from the start. Collective.

    Returns:
        Where this process rank stands.
    """
    destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=_TIMEOUT_MINUTES,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    place = layout.place_of(dist.get_rank())
    found = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_data_parallel_rank(),
    )
    dense = (place.tensor, place.context, place.data, place.replica, place.pipeline)
    own = (*dense, place.expert_tensor, place.expert, place.expert_data)
    assert found == own, f"Megatron's place {found}, ours {own}"
    return place


def destroy_groups() -> None:
    """Let go of Megatron's process groups, if there are any."""
    # Megatron remembers what rotary embeddings have told, and with it them: with hooks on them, whole models.
    RotaryEmbedding.forward.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
