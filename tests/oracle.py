"""The method once more, in NumPy and float64: what tests compare the framework with.

Written straight from METHOD.md (sections 1 to 4), with nothing of `ttt` and no JAX. Parameters are
a dict of arrays under their published dotted names, layers stacked on the leading axis; `model` and
`training` are plain dicts with the config's key names. Everything handles one sequence.
Clarity comes before speed: a cache keeps every earlier key, and the window is a mask.
"""

from collections.abc import Callable, Mapping

import numpy as np

Params = Mapping[str, np.ndarray]
Past = tuple[np.ndarray, np.ndarray]  # keys and values [n, H, K] of the n tokens before

EMBEDDING = "language_model.model.wte.weight"
FINAL_NORM = "language_model.model.ln_f.weight"
HEAD = "language_model.lm_head.weight"
BLOCKS = "language_model.model.h.blocks."
PRIMES = "language_model.model.h.prime_storage."
SWIGLU = ("w1", "w2", "w3")


# Reverse-mode derivatives: enough for the gradient of a chunk's loss by the fast weights.


class Node:
    """A value of the forward pass, and the way its cotangent takes back to what it came from.

    Without sources it is a constant or, if `traced`, a leaf to differentiate by.
    """

    def __init__(self, value, sources=(), traced=False):
        """Pair each source with the pull of a cotangent back to it; drop what no leaf reaches."""
        self.value = np.asarray(value, np.float64)
        self.sources = [(node, pull) for node, pull in sources if node.traced]
        self.traced = traced or bool(self.sources)

    def __add__(self, other: "Node") -> "Node":
        """Add arrays of one shape."""
        return Node(self.value + other.value, [(self, lambda c: c), (other, lambda c: c)])

    def __mul__(self, other: "Node") -> "Node":
        """Multiply arrays of one shape, element by element."""
        a, b = self.value, other.value
        return Node(a * b, [(self, lambda c: c * b), (other, lambda c: c * a)])

    def __matmul__(self, other: "Node") -> "Node":
        """Multiply matrices: [t, n] and [n, m]."""
        a, b = self.value, other.value
        return Node(a @ b, [(self, lambda c: c @ b.T), (other, lambda c: a.T @ c)])

    def reshape(self, *shape: int) -> "Node":
        """Give the same numbers another shape."""
        return Node(self.value.reshape(shape), [(self, lambda c: c.reshape(self.value.shape))])


def gradients(loss: Node, leaves: list[Node]) -> list[np.ndarray]:
    """Differentiate a scalar by each leaf."""
    order: list[Node] = []
    seen: set[int] = set()

    def visit(node: Node) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for source, _ in node.sources:
                visit(source)
            order.append(node)

    visit(loss)
    cotangents: dict[int, np.ndarray] = {id(loss): np.ones(())}
    for node in reversed(order):
        for source, pull in node.sources:
            pulled = pull(cotangents[id(node)])
            cotangents[id(source)] = cotangents.get(id(source), 0.0) + pulled
    return [cotangents[id(leaf)] for leaf in leaves]


# The network (section 1)


def rms_norm(x: Node, gain: np.ndarray, eps: float) -> Node:
    """RMSNorm over the last axis: gain · x · rsqrt(mean(x²) + eps)."""
    inverse = 1 / np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
    unit = x.value * inverse

    def pull(c):
        c = gain * c
        return inverse * (c - unit * np.mean(c * unit, axis=-1, keepdims=True))

    return Node(gain * unit, [(x, pull)])


def silu(x: Node) -> Node:
    """SiLU: x · sigmoid(x)."""
    sigmoid = 1 / (1 + np.exp(-x.value))
    slope = sigmoid * (1 + x.value * (1 - sigmoid))
    return Node(x.value * sigmoid, [(x, lambda c: c * slope)])


def swiglu(x: Node, w1: Node, w2: Node, w3: Node) -> Node:
    """SwiGLU: w2(silu(x·w1) ⊙ (x·w3)), [t, D] -> [t, D]."""
    return (silu(x @ w1) * (x @ w3)) @ w2


def rotate(x: Node, positions: np.ndarray, model: Mapping) -> Node:
    """Turn the pair (2i, 2i+1) of x [t, H, K] by position times its frequency, theta^(-2i/K).

    With Llama 3's scaling, turns longer than the original positions / low are `factor` times
    slower, those shorter than positions / high stay, and between them both are blended.
    """
    width = x.value.shape[-1]
    frequency = model["rope_theta"] ** (-np.arange(0, width, 2) / width)
    if scaling := model.get("rope_scaling"):
        factor, low, high, positions_then = scaling
        for i, f in enumerate(frequency):
            turns = positions_then * f / (2 * np.pi)  # within the original positions
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency[i] = share * f + (1 - share) * f / factor
    angle = positions[:, None, None] * frequency

    def turn(a, sign):
        turned = (a[..., 0::2] + 1j * a[..., 1::2]) * np.exp(sign * 1j * angle)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(a.shape)

    return Node(turn(x.value, 1), [(x, lambda c: turn(c, -1))])


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf gets no weight."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(q: Node, k: Node, v: Node, mask: np.ndarray) -> Node:
    """Attend with each head: q [t, H, K], k and v [n, H, K], mask [t, n] -> [t, H, K]."""
    scale = q.value.shape[-1] ** -0.5
    scores = scale * np.einsum("thk,nhk->htn", q.value, k.value)
    weights = softmax(np.where(mask, scores, -np.inf))

    def to_scores(c):
        c = np.einsum("thk,nhk->htn", c, v.value)
        return scale * weights * (c - np.sum(weights * c, axis=-1, keepdims=True))

    return Node(
        np.einsum("htn,nhk->thk", weights, v.value),
        [
            (q, lambda c: np.einsum("htn,nhk->thk", to_scores(c), k.value)),
            (k, lambda c: np.einsum("htn,thk->nhk", to_scores(c), q.value)),
            (v, lambda c: np.einsum("htn,thk->nhk", weights, c)),
        ],
    )


def after(past: np.ndarray, x: Node) -> Node:
    """Put the rows of x behind constant rows: [n, …], [t, …] -> [n+t, …]."""
    return Node(np.concatenate([past, x.value]), [(x, lambda c: c[len(past) :])])


def repeat_heads(x: Node, times: int) -> Node:
    """Give each head [t, G, K] to `times` query heads in a row: [t, G · times, K]."""
    shape = x.value.shape

    def back(c):
        return c.reshape(shape[0], shape[1], times, shape[2]).sum(axis=2)

    return Node(np.repeat(x.value, times, axis=1), [(x, back)])


def plus_bias(x: Node, bias: np.ndarray) -> Node:
    """Add a constant to every row."""
    return Node(x.value + bias, [(x, lambda c: c)])


def head_sizes(model: Mapping) -> tuple[int, int, int]:
    """Return (H, G, K), query heads, key/value heads, and their width."""
    heads = model["num_attention_heads"]
    kv_heads = model.get("num_key_value_heads", heads)
    return heads, kv_heads, model.get("head_dim", model["hidden_size"] // heads)


def mixers(model: Mapping) -> list[str]:
    """Return the kind of every layer's attention: SWA or self_attention."""
    names = {"sliding_attention": "SWA", "full_attention": "self_attention"}
    cycle = [names[name] for name in model.get("layer_types", ())] or [model["seq_modeling_block"]]
    return [cycle[layer % len(cycle)] for layer in range(model["num_hidden_layers"])]


def attention(x: Node, kind: str, weights: Params, past: Past, model: Mapping) -> tuple[Node, Past]:
    """Attend from x [t, D] to the tokens before and to itself: y [t, D], and the grown past.

    Keys are kept after QK-norm and before rotation; only differences of positions count, so they
    are counted from the first key there is.
    """
    tokens = len(x.value)
    heads, kv_heads, head_dim = head_sizes(model)

    def project(name: str) -> Node:
        y = x @ Node(weights[f"seq_modeling_block.{name}.weight"])
        if model.get("attention_bias", False):
            y = plus_bias(y, weights[f"seq_modeling_block.{name}.bias"])
        y = y.reshape(tokens, heads if name == "wq" else kv_heads, head_dim)
        if model["qk_norm"] and name in ("wq", "wk"):
            gain = weights[f"seq_modeling_block.{name[1]}_norm.weight"]
            y = rms_norm(y, gain, model["rms_norm_eps"])
        return y

    query, key, value = project("wq"), after(past[0], project("wk")), after(past[1], project("wv"))
    at_key = np.arange(len(key.value))
    at_query = at_key[-tokens:]
    ahead = at_query[:, None] - at_key
    mask = ahead >= 0
    if kind == "SWA":
        mask &= ahead < model["sliding_window_size"]
    shared = (repeat_heads(y, heads // kv_heads) for y in (rotate(key, at_key, model), value))
    y = attend(rotate(query, at_query, model), *shared, mask)
    y = y.reshape(tokens, heads * head_dim) @ Node(weights["seq_modeling_block.wo.weight"])
    return y, (key.value, value.value)


def suffix_start(model: Mapping) -> int:
    """Return the index of the first suffix block."""
    return model["num_hidden_layers"] - model.get("suffix_len", 0)


def row(params: Params, prefix: str, index: int) -> dict[str, np.ndarray]:
    """Take one layer from every stack below `prefix`, by the rest of the name."""
    return {n.removeprefix(prefix): p[index] for n, p in params.items() if n.startswith(prefix)}


def run_block(
    h: Node, layer: int, params: Params, fast: Mapping[str, Node], past: Past, model: Mapping
) -> tuple[Node, Past]:
    """Run one block: h [t, D] -> h [t, D], and the grown past."""
    weights = row(params, BLOCKS, layer)
    place = layer - suffix_start(model)
    has_prime = model.get("prime", False) and place >= 0
    if has_prime:
        weights |= row(params, PRIMES, place)

    def pre(x: Node, name: str) -> Node:
        return norm(x, f"{name}_norm") if model["pre_norm"] else x

    def post(x: Node, name: str) -> Node:
        return norm(x, f"{name}_post_norm") if model["post_norm"] else x

    def norm(x: Node, name: str) -> Node:
        return rms_norm(x, weights[f"{name}.weight"], model["rms_norm_eps"])

    y, past = attention(pre(h, "seq"), mixers(model)[layer], weights, past, model)
    h = h + post(y, "seq")
    if has_prime:
        prime = [fast[f"{place}.{name}"] for name in SWIGLU]
        h = h + post(swiglu(pre(h, "ffn_prime"), *prime), "ffn_prime")
    static = [Node(weights[f"feed_forward.{name}.weight"]) for name in SWIGLU]
    h = h + post(swiglu(pre(h, "ffn"), *static), "ffn")
    return h, past


def run_blocks(
    h: Node, params: Params, fast: Mapping[str, Node], pasts: Mapping[int, Past], model: Mapping
) -> tuple[Node, dict[int, Past]]:
    """Run the blocks that `pasts` names: h [t, D] -> h [t, D], and their grown pasts."""
    grown = {}
    for layer, past in pasts.items():
        h, grown[layer] = run_block(h, layer, params, fast, past, model)
    return h, grown


def token_nll(h: Node, targets: np.ndarray, params: Params, model: Mapping) -> Node:
    """Apply the final norm and the head, and score each target: [t, D] -> -log p [t]."""
    h = rms_norm(h, params[FINAL_NORM], model["rms_norm_eps"])
    logits = h @ Node(params[EMBEDDING].T if model["tie_word_embeddings"] else params[HEAD])
    hit = (np.arange(len(targets)), targets)
    shifted = logits.value - logits.value.max(axis=-1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(axis=-1)) - shifted[hit]
    excess = softmax(logits.value)
    excess[hit] -= 1
    return Node(nll, [(logits, lambda c: c[:, None] * excess)])


def masked_mean(x: Node, mask: np.ndarray) -> Node:
    """Average x [t] where the mask is true; 0 if it is true nowhere."""
    share = mask / max(mask.sum(), 1)
    return Node(share @ x.value, [(x, lambda c: c * share)])


# One sequence (sections 2 and 3)


def fast_weights(params: Params, model: Mapping) -> dict[str, np.ndarray]:
    """Return W_0: the prime MLPs as "<place in the suffix>.<w1, w2 or w3>"; {} without `prime`."""
    if not model.get("prime", False):
        return {}
    stored = {name: params[f"{PRIMES}feed_forward_prime.{name}.weight"] for name in SWIGLU}
    places = range(model["suffix_len"])
    return {f"{place}.{name}": w[place] for place in places for name, w in stored.items()}


def chunk_loss(
    h: np.ndarray, targets: np.ndarray, params: Params, fast: Params, pasts, model: Mapping
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[int, Past]]:
    """Take one chunk h [C, D] through the blocks that `pasts` names, and the head.

    Returns the chunk's loss, its token NLLs [C], the gradient of the loss by the fast weights, for
    which h and the pasts are constants, and the grown pasts.
    """
    leaves = {name: Node(w, traced=True) for name, w in fast.items()}
    out, pasts = run_blocks(Node(h), params, leaves, pasts, model)
    nll = token_nll(out, targets, params, model)
    loss = masked_mean(nll, targets != model["bos_token_id"])
    gradient = dict(zip(leaves, gradients(loss, list(leaves.values())), strict=True))
    return loss.value, nll.value, gradient, pasts


def clip_by_global_norm(gradient: Params, bound: float) -> Params:
    """Scale all of it down to a norm of at most `bound`; 0: as it is."""
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    if bound == 0 or norm < bound:
        return gradient
    return {name: g * (bound / norm) for name, g in gradient.items()}


def inner_rate(training: Mapping, step: int | None) -> float:
    """Return η · m(s) at outer step s; None: η, as in evaluation and inference."""
    rate, warmup = training["optimizer_inner"]["lr"], training["ilr_warmup_steps"]
    if step is None or warmup == 0:
        return rate
    return training["ilr_init"] + (rate - training["ilr_init"]) * min(1, (step + 1) / warmup)


def inner_step(fast: Params, gradient: Params, training: Mapping, step: int | None) -> Params:
    """Step the fast weights: W_{i+1} = W_i - η · m(s) · clip(g_i)."""
    clipped = clip_by_global_norm(gradient, training["optimizer_inner"]["clip_gradient"])
    return {name: w - inner_rate(training, step) * clipped[name] for name, w in fast.items()}


def sequence_loss(
    params: Params,
    model: Mapping,
    training: Mapping,
    tokens: np.ndarray,
    step: int | None = 0,
    inner: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses by chunk [T/C] and -log p of every target [T], unmasked, for tokens [T+1].

    The sequence's loss is the mean over the chunks. `step` is the outer step s of the inner
    warm-up (None: no warm-up); with `inner` false the fast weights stand still in `meta` too.
    Only `pretrain` knows `self_attention`.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    meta = training["train_mode"] == "meta"
    split = suffix_start(model) if meta else 0
    nothing = np.zeros((0, *head_sizes(model)[1:]))
    unread = dict.fromkeys(range(model["num_hidden_layers"]), (nothing, nothing))

    prefix = {layer: past for layer, past in unread.items() if layer < split}
    h, _ = run_blocks(Node(params[EMBEDDING][inputs]), params, {}, prefix, model)
    pasts = {layer: past for layer, past in unread.items() if layer >= split}
    fast = fast_weights(params, model)
    losses, nlls = [], []
    for start in range(0, len(inputs), model["mini_batch_size"]):
        chunk = slice(start, start + model["mini_batch_size"])
        if set(mixers(model)) == {"self_attention"}:  # each window on its own
            pasts = {layer: unread[layer] for layer in pasts}
        loss, nll, gradient, pasts = chunk_loss(
            h.value[chunk], targets[chunk], params, fast, pasts, model
        )
        if meta and inner:
            fast = inner_step(fast, gradient, training, step)
        losses.append(loss)
        nlls.append(nll)
    return np.array(losses), np.concatenate(nlls)


def directional_derivative(
    f: Callable[[Params], float], params: Params, direction: Params, eps: float
) -> float:
    """Differentiate f at `params` by central differences; names not in `direction` stay."""

    def moved(by: float) -> dict[str, np.ndarray]:
        return {**params, **{name: params[name] + by * d for name, d in direction.items()}}

    return (f(moved(eps)) - f(moved(-eps))) / (2 * eps)


# The outer step (section 4)


def learning_rate(cfg: Mapping, step: int) -> float:
    """Follow `warmup_cosine_decay_schedule`: `lr_decay_steps` includes the warm-up's."""
    warmup, total = cfg["lr_warmup_steps"], cfg["lr_decay_steps"]
    if step < warmup:
        return cfg["init_lr"] + (cfg["lr"] - cfg["init_lr"]) * step / warmup
    done = min(1, (step - warmup) / (total - warmup))
    return cfg["end_lr"] + (cfg["lr"] - cfg["end_lr"]) * (1 + np.cos(np.pi * done)) / 2


def adamw_step(
    params: Params, grads: Params, state: tuple[Params, Params] | None, step: int, cfg: Mapping
) -> tuple[dict, tuple[dict, dict], float]:
    """Return new parameters, new moments and the reported gradient norm, at `step` (from 0).

    `cfg` is `optimizer_outer`; `state` None starts from zero moments. Moments are float64: there is
    no `bf16_momentum` here.
    """
    eps = 1e-8  # optax's default; the configs have no key for it
    first, second = state or (dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0))
    grad_norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()) + 1e-5)
    clipped = clip_by_global_norm(grads, cfg["clip_gradient"])
    b1, b2 = cfg["b1"], cfg["b2"]
    first = {name: b1 * first[name] + (1 - b1) * g for name, g in clipped.items()}
    second = {name: b2 * second[name] + (1 - b2) * g**2 for name, g in clipped.items()}

    def updated(name: str, p: np.ndarray) -> np.ndarray:
        mean = first[name] / (1 - b1 ** (step + 1))
        square = second[name] / (1 - b2 ** (step + 1))
        spared = name == EMBEDDING and not cfg.get("emb_wd", True)
        decay = 0.0 if spared else cfg["weight_decay"]
        return p - learning_rate(cfg, step) * (mean / (np.sqrt(square) + eps) + decay * p)

    return {name: updated(name, p) for name, p in params.items()}, (first, second), grad_norm
