"""PyTorch's side of the GPU benchmark: reads one piece of work a line, answers { seconds, bytes?, note? } a line.

Times are by CUDA events over many runs between two synchronizations, the median of five samples. Argument: cuda, or any for
the GPU where there is one and the CPU otherwise.
"""

import contextlib
import json
import math
import sys
import time

import torch
import torch.nn.functional as F

DEVICE = "cuda" if sys.argv[1] != "any" or torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
BF16 = torch.bfloat16


def random(*shape, dtype=BF16):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def sample(run, count):
    """Seconds of one of `count` runs."""
    synchronize()
    if not ON_GPU:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    synchronize()
    return start.elapsed_time(end) / 1e3 / count


def timed(run, seconds=0.2, samples=5, warmup=3):
    for _ in range(warmup):
        sample(run, 1)
    count = max(1, min(1000, round(seconds / samples / sample(run, 1))))
    return sorted(sample(run, count) for _ in range(samples))[samples // 2]


def with_memory(run):
    """Seconds, and the most bytes that a run holds beyond what lay there before it."""
    run()
    synchronize()
    if not ON_GPU:
        return {"seconds": timed(run), "bytes": 1}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    bytes_ = torch.cuda.max_memory_allocated() - before
    return {"seconds": timed(run, seconds=1), "bytes": bytes_}


def rotating(make, sets):
    runs, i = [make() for _ in range(sets)], 0

    def run():
        nonlocal i
        runs[i % sets]()
        i += 1

    return run


def version(_):
    return {"torch": torch.__version__}


def product(work):
    m, n, k = work["M"], work["N"], work["K"]
    layouts = {
        "forward": lambda: (random(m, k), random(n, k).t()),
        "input gradient": lambda: (random(m, k), random(k, n)),
        "weight gradient": lambda: (random(k, m).t(), random(k, n)),
    }
    a, b = layouts[work["layout"]]()
    out = torch.empty(m, n, device=DEVICE, dtype=BF16)
    return {"seconds": timed(lambda: torch.matmul(a, b, out=out))}


def attention(work):
    count, length, width = work["count"], work["length"], work["width"]
    q = random(count, work["heads"], length, width).requires_grad_()
    k, v = (random(count, work["groups"], length, width).requires_grad_() for _ in range(2))
    note = "enable_gqa"

    def call():
        if note == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q, repeated[0], repeated[1], is_causal=True)

    repeated = [t.detach().repeat_interleave(work["heads"] // work["groups"], 1).requires_grad_() for t in (k, v)]
    with flash():
        try:
            call()
        except (RuntimeError, TypeError):
            note = "keys and values repeated beforehand"
            call()
        if work["pass"] == "forward":
            with torch.no_grad():
                return {"seconds": timed(call), "note": note}
        out, inputs = call(), [q, k, v] if note == "enable_gqa" else [q, *repeated]
        g = torch.randn_like(out)
        return {"seconds": timed(lambda: torch.autograd.grad(out, inputs, g, retain_graph=True)), "note": note}


def flash():
    if not ON_GPU:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def copy(work):
    x = random(work["elements"], dtype=torch.float32)
    y = torch.empty_like(x)
    return {"seconds": timed(lambda: y.copy_(x))}


def gradient_of(f, *inputs):
    """The backward pass of f alone."""
    for x in inputs:
        x.requires_grad_()
    y = f(*inputs)
    g = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, g, retain_graph=True)


def norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def add_norm(x, delta, weight):
    total = x + delta
    return total, norm(total, weight)


def add_norm_gradient(shape):
    """The gradient of x + delta: from its norm, and from where it goes on."""
    x, g, elsewhere = random(*shape).requires_grad_(), random(*shape), random(*shape)
    y = norm(x, random(shape[1]))
    return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0] + elsewhere


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def adamw(shape):
    p = torch.nn.Parameter(random(*shape, dtype=torch.float32))
    p.grad = random(*shape, dtype=torch.float32)
    return torch.optim.AdamW([p], lr=1e-6, fused=True).step


def rotary(shape):
    x = random(*shape)
    cos, sin = random(shape[0], 1, shape[2]), random(shape[0], 1, shape[2])
    return lambda: rotate(x, cos, sin)


def forward_of(f, *inputs):
    def run():
        with torch.no_grad():
            f(*inputs)

    return run


MEMORY_BOUND = {
    "rmsNorm": lambda s: forward_of(norm, random(*s), random(s[1])),
    "addRmsNorm": lambda s: forward_of(add_norm, random(*s), random(*s), random(s[1])),
    "addRmsNormBackward": add_norm_gradient,
    "rmsNormBackward": lambda s: gradient_of(lambda x, w=random(s[1]): norm(x, w), random(*s)),
    "rmsNormBackwardWeight": lambda s: gradient_of(norm, random(*s), random(s[1])),
    "swiglu": lambda s: forward_of(lambda g, u: F.silu(g) * u, random(*s), random(*s)),
    "swigluBackward": lambda s: gradient_of(lambda g, u: F.silu(g) * u, random(*s), random(*s)),
    "rotary": rotary,
    "adamw": adamw,
}


def memory_bound(work):
    return {"seconds": timed(rotating(lambda: MEMORY_BOUND[work["op"]](work["shape"]), work["sets"]))}


def head(work):
    hidden = random(work["rows"], work["width"]).requires_grad_()
    weight = random(work["vocabulary"], work["width"]).requires_grad_(work["withWeight"])
    ids = torch.randint(0, work["vocabulary"], (work["rows"], 1), device=DEVICE)
    g = random(work["rows"], 1, dtype=torch.float32)
    inputs = [hidden, weight] if work["withWeight"] else [hidden]

    def run():
        log_probs = torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, ids)
        torch.autograd.grad(log_probs, inputs, g)

    return with_memory(run)


class LoraLinear(torch.nn.Module):
    """A frozen linear with float32 adapters that are cast for the product."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale, self.enabled = base, alpha / rank, True
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.a = torch.nn.Parameter(torch.randn(rank, base.in_features, **place) / math.sqrt(base.in_features))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank, **place))

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        return y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


def lora_model(work):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings")
    config = Qwen2Config(**{n: work["config"][n] for n in names}, attn_implementation="sdpa")
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config).to(BF16)
    model.requires_grad_(False)
    adapters = []
    for layer in model.model.layers:
        for part, keys in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for key in keys:
                adapter = LoraLinear(getattr(part, f"{key}_proj"), work["rank"], work["alpha"])
                setattr(part, f"{key}_proj", adapter)
                adapters.append(adapter)
    return model, adapters


@contextlib.contextmanager
def without(adapters):
    for a in adapters:
        a.enabled = False
    yield
    for a in adapters:
        a.enabled = True


def selective_log_softmax(logits, ids):
    """As TRL: row by row in bfloat16, to save memory."""
    return torch.stack([F.log_softmax(row, -1).gather(-1, i[:, None])[:, 0] for row, i in zip(logits, ids)])


def log_probs_trl(model, ids, prompt):
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    per_token = selective_log_softmax(logits, ids[:, 1:])
    mask = torch.arange(ids.shape[1] - 1, device=ids.device) >= prompt - 1
    return (per_token * mask).sum(1), logits[:, prompt - 1:].detach().mean()


def log_probs_tuned(model, ids, prompt):
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, prompt - 1:-1]
    logits = F.linear(hidden, model.lm_head.weight).float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, prompt:, None])[..., 0].sum(1), None


def dpo(work):
    model, adapters = lora_model(work)
    parameters = [p for a in adapters for p in (a.a, a.b)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, **({"fused": True} if ON_GPU else {}))
    pairs, prompt = work["pairs"], work["prompt"]
    ids = torch.randint(0, work["config"]["vocab_size"], (2 * pairs, prompt + work["response"]), device=DEVICE)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    log_probs = log_probs_trl if work["variant"] == "trl" else log_probs_tuned
    cached = torch.zeros(2 * pairs, device=DEVICE)

    def reference():
        if work["variant"] != "trl":
            return cached
        with torch.no_grad(), without(adapters):
            return log_probs(model, ids, prompt)[0]

    def step():
        policy, mean_logits = log_probs(model, ids, prompt)
        ratios = (policy - reference()).float()
        margins = 0.1 * (ratios[:pairs] - ratios[pairs:])
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        norm_ = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told = [loss, norm_, margins.mean(), (margins > 0).float().mean()] + ([] if mean_logits is None else [mean_logits])
        return [t.item() for t in told]

    for _ in range(2):
        step()
    times = []
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(work["steps"]):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    return {"seconds": sorted(times)[len(times) // 2], "bytes": peak}


KINDS = {"version": version, "product": product, "attention": attention, "copy": copy, "memoryBound": memory_bound,
         "head": head, "dpo": dpo}


def main():
    torch.manual_seed(0)
    for line in sys.stdin:
        work = json.loads(line)
        try:
            answer = KINDS[work["kind"]](work)
        except Exception as error:  # one piece of work must not end the run
            answer = {"error": f"{type(error).__name__}: {error}"}
        if ON_GPU:
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


main()
