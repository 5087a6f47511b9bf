"""What is tried on the model without storage before a run: whether its options fit the model."""

from dataclasses import replace

from torch import nn

from narrowgauge.optimizers.compact.options import CompactOptions

from ..config.config import Config
from ..config.optimizer_params import make_optimizer
from ..lora.adapters import add_adapters
from ..offload.attach import check_codec
from ..quantization.quantize import quantize_trial
from ..sampled_backward import sample_trial


def try_on(config: Config, abstract: nn.Module) -> None:
    """Change the model as the run's will be.

    Raises:
        ConfigError: naming the key that does not fit it.
    """
    if config.parsed.lora is not None:
        add_adapters(abstract, config.parsed.lora, seed=None)
    quantize_trial(config, abstract)
    sample_trial(config, abstract)
    options, block = config.optimizer_options, config.parsed.optimizer
    if options is not None and block is not None:
        if isinstance(options, CompactOptions):
            # Whether all of torch's devices take it is not for tensors without storage to say.
            options = replace(options, fused=None)
        with config.blames("optimizer.params"):
            make_optimizer(block.type, abstract, options)
    check_codec(config, abstract)
