"""Keys that people know from other optimizers, and what stands for them here. Light to import."""

_EXPLAINED = {
    "max_grad_norm": "gradients are clipped by the top-level key gradient_clipping",
    **dict.fromkeys(
        ("max_coeff", "min_coeff"),
        "it bounds the trust ratio of DeepSpeed's Lamb, another than narrowgauge's, which bounds the weights' norm"
        " in it by weight_norm_bounds",
    ),
    "bias_correction": "it is of DeepSpeed's optimizers; narrowgauge's always correct the bias, as true does",
    "eps_inside_sqrt": "it is of DeepSpeed's Lamb; narrowgauge's adds eps outside the root, as false does",
    **dict.fromkeys(
        ("adam_w_mode", "torch_adam"), "it is of DeepSpeed's Adam; narrowgauge's decay is always decoupled, as AdamW's"
    ),
    **dict.fromkeys(
        (
            "freeze_step",
            "cuda_aware",
            "comm_backend_name",
            "coeff_beta",
            "factor_max",
            "factor_min",
            "factor_threshold",
        ),
        "it is of DeepSpeed's 1-bit optimizers",
    ),
}


def explained(key: str) -> str:
    """``; what to use instead`` for a key that people know from another optimizer, or nothing."""
    return f"; {_EXPLAINED[key]}" if key in _EXPLAINED else ""
