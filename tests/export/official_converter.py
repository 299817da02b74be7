"""llama.cpp's own converter, run as a program: `python official_converter.py SOURCES IN OUT [IN OUT ...]`.

It knows tokenizers by a hash of what they do, which no tokenizer of the tests has, and wants SentencePiece's own file
for some families; so it is told to take them as GPT-2's. Tensors and all other metadata are its own.
"""

import sys
from pathlib import Path


def main(sources: str, *pairs: str) -> None:
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    with torch.inference_mode():
        for model, file in zip(pairs[::2], pairs[1::2], strict=True):
            hparams = ModelBase.load_hparams(Path(model), False)
            base = get_model_class(get_model_architecture(hparams, ModelType.TEXT), mmproj=False)
            taught = {"set_vocab": base._set_vocab_gpt2, "get_vocab_base_pre": lambda self, tokenizer: "gpt-2"}
            kind = type(base.__name__, (base,), {"model_arch": base.model_arch, **taught})
            kind(Path(model), gguf.LlamaFileType.ALL_F32, Path(file)).write()


if __name__ == "__main__":
    main(*sys.argv[1:])
