"""RWKV-6 and RWKV-7 in numpy and float64, one token after the other: what the model is held to.

Written from the papers alone and without any code of the project: matrices as matrices, one head
at a time, sizes read from the tensors.

Source: "Eagle and Finch", arXiv:2404.05892, section 4.2 (RWKV-6); "RWKV-7 Goose",
arXiv:2503.14456, section 4 (RWKV-7). Names of tensors as in BlinkDL's files.
"""

from collections.abc import Sequence

import numpy as np

Tensors = dict[str, np.ndarray]
State = list[dict[str, np.ndarray]]


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2


def norm(x, weight, bias, eps=1e-5):
    """Layer norm of one vector."""
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


class Oracle:
    """A model given by its tensors.

    A layer's state is {"att": the time mix's last input, "ffn": the channel mix's, "wkv": one
    matrix a head, values on rows and keys on columns}.
    """

    def __init__(self, tensors: Tensors):
        self.tensors = {name: np.asarray(t, dtype=np.float64) for name, t in tensors.items()}
        self.version = 7 if "blocks.0.att.r_k" in tensors else 6
        self.layers = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks."))
        heads = tensors["blocks.0.att.r_k" if self.version == 7 else "blocks.0.att.time_faaaa"]
        self.H, self.N = heads.shape
        self.blocks = [self._below(f"blocks.{layer}.") for layer in range(self.layers)]
        self.att = [self._below(f"blocks.{layer}.att.") for layer in range(self.layers)]
        self.ffn = [self._below(f"blocks.{layer}.ffn.") for layer in range(self.layers)]

    def _below(self, prefix: str) -> Tensors:
        """The tensors whose names begin with `prefix`, without it and without sides of 1."""
        return {
            name.removeprefix(prefix): tensor.squeeze()
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def zero_state(self) -> State:
        C = self.tensors["emb.weight"].shape[1]
        return [
            {"att": np.zeros(C), "ffn": np.zeros(C), "wkv": np.zeros((self.H, self.N, self.N))}
            for _ in range(self.layers)
        ]

    def logits(self, tokens: Sequence[int], state: State | None = None) -> np.ndarray:
        """[T, V]: row t scores the token that follows tokens[t]; `state` is moved on in place."""
        state = self.zero_state() if state is None else state
        return np.stack([self.step(token, state) for token in tokens])

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean negative log-probability of tokens[1:], in nats."""
        logits = self.logits(tokens[:-1])
        largest = logits.max(axis=1, keepdims=True)
        total = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
        return float((total - logits[np.arange(len(tokens) - 1), list(tokens[1:])]).mean())

    def step(self, token: int, state: State) -> np.ndarray:
        """Read one token, moving `state` on; the logits [V] of the next."""
        p = self.tensors
        x = norm(p["emb.weight"][token], p["blocks.0.ln0.weight"], p["blocks.0.ln0.bias"])
        first_values = np.zeros(0)
        for layer in range(self.layers):
            block, memory = self.blocks[layer], state[layer]
            inner = norm(x, block["ln1.weight"], block["ln1.bias"])
            if self.version == 7:
                out, first_values = self.time_mix7(inner, memory, layer, first_values)
            else:
                out = self.time_mix6(inner, memory, layer)
            x = x + out
            inner = norm(x, block["ln2.weight"], block["ln2.bias"])
            x = x + self.channel_mix(inner, memory, layer)
        return p["head.weight"] @ norm(x, p["ln_out.weight"], p["ln_out.bias"])

    def time_mix6(self, x, memory, layer):
        q = self.att[layer]
        before = memory["att"] - x
        memory["att"] = x

        rank = q["time_maa_w1"].shape[1] // 5
        low = np.tanh((x + before * q["time_maa_x"]) @ q["time_maa_w1"])
        mixed = {}
        for i, name in enumerate("wkvrg"):
            delta = low[i * rank : (i + 1) * rank] @ q["time_maa_w2"].reshape(5, rank, -1)[i]
            mixed[name] = x + before * (q[f"time_maa_{name}"] + delta)

        r = q["receptance.weight"] @ mixed["r"]
        k = q["key.weight"] @ mixed["k"]
        v = q["value.weight"] @ mixed["v"]
        gate = q["gate.weight"] @ mixed["g"]
        decay = q["time_decay"] + np.tanh(mixed["w"] @ q["time_decay_w1"]) @ q["time_decay_w2"]
        kept = np.exp(-np.exp(decay))

        heads = []
        for h in range(self.H):
            of_head = slice(h * self.N, (h + 1) * self.N)
            u = q["time_faaaa"].reshape(self.H, self.N)[h]
            written = np.outer(v[of_head], k[of_head])
            y = (memory["wkv"][h] + written @ np.diag(u)) @ r[of_head]
            memory["wkv"][h] = memory["wkv"][h] @ np.diag(kept[of_head]) + written
            heads.append(norm(y, q["ln_x.weight"][of_head], q["ln_x.bias"][of_head], 64e-5))
        return q["output.weight"] @ (np.concatenate(heads) * gate * sigmoid(gate))

    def time_mix7(self, x, memory, layer, first_values):
        q = self.att[layer]
        before = memory["att"] - x
        memory["att"] = x
        mixed = {name: x + before * q[f"x_{name}"] for name in "rwkvag"}

        r = q["receptance.weight"] @ mixed["r"]
        k = q["key.weight"] @ mixed["k"]
        v = q["value.weight"] @ mixed["v"]
        decay = q["w0"] + np.tanh(mixed["w"] @ q["w1"]) @ q["w2"]
        kept = np.exp(-np.exp(-0.5) * sigmoid(decay))
        iclr = sigmoid(q["a0"] + mixed["a"] @ q["a1"] @ q["a2"])
        gate = sigmoid(mixed["g"] @ q["g1"]) @ q["g2"]
        if layer == 0:
            first_values = v
        else:
            share = sigmoid(q["v0"] + mixed["v"] @ q["v1"] @ q["v2"])
            v = (1 - share) * v + share * first_values
        removal = k * q["k_k"]
        k = k * (1 - q["k_a"] + iclr * q["k_a"])

        heads = []
        for h in range(self.H):
            of_head = slice(h * self.N, (h + 1) * self.N)
            length = max(np.linalg.norm(removal[of_head]), 1e-12)
            kappa = removal[of_head] / length
            transition = np.diag(kept[of_head]) - np.outer(kappa, iclr[of_head] * kappa)
            memory["wkv"][h] = memory["wkv"][h] @ transition + np.outer(v[of_head], k[of_head])
            y = memory["wkv"][h] @ r[of_head]
            y = norm(y, q["ln_x.weight"][of_head], q["ln_x.bias"][of_head], 64e-5)
            bonus = q["r_k"].reshape(self.H, self.N)[h] @ (r[of_head] * k[of_head])
            heads.append(y + bonus * v[of_head])
        return q["output.weight"] @ (np.concatenate(heads) * gate), first_values

    def channel_mix(self, x, memory, layer):
        q = self.ffn[layer]
        before = memory["ffn"] - x
        memory["ffn"] = x
        if self.version == 7:
            inner = np.maximum(q["key.weight"] @ (x + before * q["x_k"]), 0) ** 2
            return q["value.weight"] @ inner
        inner = np.maximum(q["key.weight"] @ (x + before * q["time_maa_k"]), 0) ** 2
        gate = sigmoid(q["receptance.weight"] @ (x + before * q["time_maa_r"]))
        return gate * (q["value.weight"] @ inner)


def random_tensors(
    version: int,
    *,
    layers: int = 2,
    C: int = 24,
    N: int = 8,
    V: int = 32,
    heads: int = 0,
    dim_ffn: int = 44,
    seed: int = 0,
) -> Tensors:
    """Every tensor of a small model, float32, with values in the range that training gives them.

    heads: of the time mix; 0 for C / N, more or fewer make it wider or narrower than the stream.
    The low ranks are odd and differ. Logits have a standard deviation of about 1.
    """
    draw = np.random.default_rng(seed)
    H = heads or C // N
    A = H * N
    tensors: Tensors = {}

    def matrix(name, *shape, scale=1.0):
        value = draw.standard_normal(shape) * scale / np.sqrt(shape[-1])
        tensors[name] = value.astype(np.float32)

    def vector(name, *shape, mean=0.0, spread=0.3):
        value = mean + draw.standard_normal(shape) * spread
        tensors[name] = value.astype(np.float32)

    def layer_norm(name, width):
        vector(f"{name}.weight", width, mean=1.0, spread=0.1)
        vector(f"{name}.bias", width, spread=0.1)

    matrix("emb.weight", V, C)
    for layer in range(layers):
        block = f"blocks.{layer}."
        for name in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            layer_norm(block + name, C)
        att, ffn = block + "att.", block + "ffn."
        layer_norm(att + "ln_x", A)
        for name in ("receptance", "key", "value"):
            matrix(f"{att}{name}.weight", A, C)
        matrix(f"{att}output.weight", C, A)
        matrix(f"{ffn}key.weight", dim_ffn, C)
        matrix(f"{ffn}value.weight", C, dim_ffn)
        if version == 6:
            matrix(f"{att}gate.weight", A, C)
            matrix(f"{ffn}receptance.weight", C, C)
            for name in "xwkvrg":
                vector(f"{att}time_maa_{name}", 1, 1, C, mean=0.5)
            matrix(f"{att}time_maa_w1", C, 5 * 3)
            matrix(f"{att}time_maa_w2", 5, 3, C, scale=0.5)
            vector(f"{att}time_decay", 1, 1, A, mean=-2.0, spread=2.0)
            matrix(f"{att}time_decay_w1", C, 7)
            matrix(f"{att}time_decay_w2", 7, A)
            vector(f"{att}time_faaaa", H, N)
            for name in "kr":
                vector(f"{ffn}time_maa_{name}", 1, 1, C, mean=0.5)
            continue
        for name in "rwkvag":
            vector(f"{att}x_{name}", 1, 1, C, mean=0.5)
        low_ranks = {"w": 5, "a": 3, "g": 9} | ({"v": 7} if layer else {})
        for name, rank in low_ranks.items():
            matrix(f"{att}{name}1", C, rank)
            matrix(f"{att}{name}2", rank, A)
            if name != "g":
                mean, spread = {"w": (-2.0, 2.0), "a": (0.0, 1.0), "v": (0.0, 1.0)}[name]
                vector(f"{att}{name}0", 1, 1, A, mean=mean, spread=spread)
        vector(f"{att}k_k", 1, 1, A, mean=0.8)
        vector(f"{att}k_a", 1, 1, A, mean=1.0)
        vector(f"{att}r_k", H, N)
        vector(f"{ffn}x_k", 1, 1, C, mean=0.5)
    layer_norm("ln_out", C)
    matrix("head.weight", V, C)
    return tensors
