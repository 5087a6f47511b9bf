"""A process rank's part of a model: Megatron's ``GPTModel``, one for each chunk of layers."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from .architecture import Architecture
from .kernels import PLAIN, Kernels
from .keys import BalanceLoss, MegatronBlock
from .layout import Layout, Place
from .parts import LocalParameter, local_parameters
from .router import CountingRouter
from .specification import block_specification


class StagedModel(nn.Module):
    """What a process rank holds of a model.

    Attributes:
        config: Hugging Face's.
        chunks: pieces of the model, in the order of its layers.
        held: each chunk's parameters by their names in it, and where they lie in the model's weights.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        architecture: Architecture,
        layout: Layout,
        place: Place,
        transformer: TransformerConfig,
        sequence_length: int,
        balance: BalanceLoss = "none",
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.config, self.architecture, self.layout, self.place = config, architecture, layout, place
        self.transformer, self.kernels = transformer, kernels
        self.chunks = nn.ModuleList(
            _Chunk(architecture, layout, place, transformer, sequence_length, number, balance, kernels)
            for number in range(layout.chunks)
        )
        self.held: list[dict[str, LocalParameter]] = []
        for number, chunk in enumerate(self.chunks):
            held = {p.name: p for p in local_parameters(architecture, layout, place, number, kernels)}
            found = {name: tuple(tensor.shape) for name, tensor in chunk.named_parameters()}
            expected = {name: parameter.shape for name, parameter in held.items()}
            assert found == expected, f"Megatron's parameters {found.items() ^ expected.items()}"
            self.held.append(held)
        for parameter, tensor in self.local_parameters():
            # Megatron marks what it draws itself; without a mark, the norm of gradients counts one rank's alone.
            if parameter.cut is not None and not hasattr(tensor, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(tensor, True, parameter.cut, 1)
            if parameter.is_expert:
                # Megatron marks experts that lie on several ranks, not those that are only shared by others.
                tensor.allreduce = not layout.splits_experts  # pyright: ignore[reportAttributeAccessIssue]

    def local_parameters(self) -> Iterator[tuple[LocalParameter, nn.Parameter]]:
        """All that were there when the model was built, in order: the same that are in ``held``."""
        for chunk, held in zip(self.chunks, self.held, strict=True):
            for name, tensor in chunk.named_parameters():
                if name in held:
                    yield held[name], tensor

    @property
    def routers(self) -> dict[int, CountingRouter]:
        """By number of the layer in the whole model; none for a model without experts."""
        found: dict[int, CountingRouter] = {}
        for number, chunk in enumerate(self.chunks):
            layers = self.layout.layers_of(self.place, number, self.architecture.num_layers)
            routers = [module for module in chunk.modules() if isinstance(module, CountingRouter)]
            found |= dict(zip(layers, routers, strict=bool(routers)))
        return found


class _Chunk(GPTModel):
    """A piece of the model, whose loss does not see the padding of the vocabulary.

    Attributes:
        leaves_out_head: forward ends with the last layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        place: Place,
        transformer: TransformerConfig,
        sequence_length: int,
        number: int,
        balance: BalanceLoss,
        kernels: Kernels,
    ) -> None:
        num_layers = len(layout.layers_of(place, number, architecture.num_layers))
        block: Any = block_specification(architecture, num_layers, balance, kernels)
        super().__init__(
            transformer,
            block,
            architecture.padded_vocab(layout.tensor),
            sequence_length,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]
            share_embeddings_and_output_weights=architecture.tied,
            parallel_output=True,
            pre_process=layout.is_first(place, number),
            post_process=layout.is_last(place, number),
            vp_stage=number if layout.chunks > 1 else None,
        )
        size = architecture.padded_vocab(layout.tensor) // layout.tensor
        self.leaves_out_head = False
        self._num_real = max(0, min(size, architecture.vocab - place.tensor * size))

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.leaves_out_head else super()._postprocess(hidden_states, *args, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """
        Args:
            labels: ``(batch, sequence)``.
            logits: ``(sequence, batch, vocabulary / tensor-parallel ranks)``.

        Returns:
            Losses, ``(batch, sequence)``, fp32.
        """
        logits = logits.float()
        if self._num_real < logits.shape[-1]:
            is_padding = torch.arange(logits.shape[-1], device=logits.device) >= self._num_real
            logits = logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t().contiguous()


def transformer_config(
    architecture: Architecture, layout: Layout, block: MegatronBlock, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of the layers."""
    settings: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden,
        "ffn_hidden_size": architecture.width,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_heads,
        "kv_channels": architecture.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Fused kernels need apex or Transformer Engine.
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.chunks if layout.chunks > 1 else None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": layout.sequence_parallel,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        # The weights are ours to draw or to read.
        "perform_initialization": False,
        **_recompute(block),
        **_pipeline(layout),
    }
    if architecture.num_experts:
        settings |= _experts(architecture, block)
    return TransformerConfig(**settings)


def _recompute(block: MegatronBlock) -> dict[str, Any]:
    if block.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": block.recompute_layers,
        }
    if block.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(block.recompute_modules)}
    return {}


def _pipeline(layout: Layout) -> dict[str, Any]:
    """How stages send to each other.

    Interleaved, the next and the previous stage may be one process, and messages in one batch then change places
    (silently wrong numbers): each is sent on its own there. What is sent so may still be read when its memory is given
    back, so that outputs are kept.
    """
    if layout.chunks > 1:
        return {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
    return {"overlap_p2p_comm": False, "batch_p2p_comm": True, "deallocate_pipeline_outputs": layout.pipeline > 1}


def _experts(architecture: Architecture, block: MegatronBlock) -> dict[str, Any]:
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.expert_width,
        "moe_shared_expert_intermediate_size": architecture.shared_width or None,
        "moe_shared_expert_gate": architecture.shared_width > 0,
        # Weights that sum to one: of the chosen scores alone.
        "moe_router_pre_softmax": not architecture.renormalized,
        "moe_router_dtype": "fp32",
        # The router has a loss of ours.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": block.expert_dispatcher,
        "moe_expert_capacity_factor": block.expert_capacity_factor,
        "moe_grouped_gemm": block.grouped_experts,
    }
