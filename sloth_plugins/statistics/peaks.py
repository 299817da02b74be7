"""What cards can do at most: dense bf16/fp16 products with fp32 sums, by their makers' data sheets."""

import re

# Name as torch gives it -> TFLOP/s; the whole name must match, so that a laptop's card or a MIG slice is no full card.
PEAKS = {
    r"NVIDIA GB200": 2500,
    r"NVIDIA B200": 2250,
    r"NVIDIA GH200.*": 989,
    r"NVIDIA H200( NVL)?": 989,
    r"NVIDIA H(1|8)00( 80GB HBM3)?|NVIDIA H100 SXM.*": 989,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H20": 148,
    r"(NVIDIA )?A(1|8)00[- ].*": 312,
    r"NVIDIA A30": 165,
    r"NVIDIA A40": 150,
    r"NVIDIA RTX A6000": 155,
    r"NVIDIA A10": 125,
    r"NVIDIA A10G": 70,
    r"NVIDIA L40S": 362,
    r"NVIDIA L40": 181,
    r"NVIDIA L4": 121,
    r"NVIDIA RTX 6000 Ada Generation": 364,
    r"NVIDIA GeForce RTX 5090": 209,
    r"NVIDIA GeForce RTX 4090": 165,
    r"NVIDIA GeForce RTX 3090": 71,
    r"Tesla V100-SXM2.*": 125,
    r"Tesla V100-PCIE.*": 112,
    r"Tesla T4": 65,
    r"AMD Instinct MI300X.*": 1307,
    r"AMD Instinct MI325X.*": 1307,
}


def peak_flops(device: str) -> float | None:
    """FLOP/s of a card by the name that torch gives it; None for one that is not known."""
    if "MIG" in device:
        return None
    return next((peak * 1e12 for name, peak in PEAKS.items() if re.fullmatch(name, device)), None)
