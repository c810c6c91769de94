"""PyTorch's times for the benchmark: reads one piece of work a line, answers its best and median seconds.

Work: {"op", "inputs": [{"shape", "kind"}], "dtype", "params", "gradient", "time"}; an unknown op is answered by {}.
"""

import functools
import json
import math
import resource
import sys
import time

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int32": torch.int32}

UNARY = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal,
    "square": torch.square, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "logSigmoid": F.logsigmoid, "softplus": F.softplus, "relu": torch.relu, "silu": F.silu,
    "clone": torch.clone, "contiguous": lambda x: x.contiguous(),
}
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "rsub": lambda a, b: b - a, "rdiv": lambda a, b: b / a, "maximum": torch.maximum, "minimum": torch.minimum,
    "equal": torch.eq, "notEqual": torch.ne, "less": torch.lt, "lessEqual": torch.le, "greater": torch.gt,
    "greaterEqual": torch.ge, "matmul": torch.matmul,
}


def axes_of(x, params):
    axes = params.get("axes")
    return tuple(range(x.dim())) if axes is None else axes


def attention(q, k, v, params):
    """Each response after its prompt, as padding-free batches of one: what a pair costs without a shared prompt."""
    parts, outputs, starts = params["parts"], [], [0]
    for part in parts:
        starts.append(starts[-1] + part["length"])
    children = {p.get("parent", -1) for p in parts}
    for i, part in enumerate(parts):
        if i in children:
            continue
        rows = list(range(starts[i], starts[i + 1]))
        parent = part.get("parent", -1)
        if parent >= 0:
            rows = list(range(starts[parent], starts[parent + 1])) + rows
        pick = torch.tensor(rows)
        a, b, c = (t[pick].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True))
    return outputs


def rotary(x, positions, table, params):
    half = x.shape[-1] // 2
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in table[positions.long()].split(half, dim=1))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def head(hidden, weight, rows, ids, params):
    logits = F.linear(hidden, weight)
    return torch.log_softmax(logits.float(), dim=-1)[rows.long(), ids.long()]


def lora(x, w, a, b, params):
    return F.linear(x, w) + params["scale"] * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


OPS = {
    "sum": lambda x, p: x.sum(axes_of(x, p)),
    "mean": lambda x, p: x.mean(axes_of(x, p)),
    "max": lambda x, p: x.amax(axes_of(x, p)),
    "min": lambda x, p: x.amin(axes_of(x, p)),
    "softmax": lambda x, p: torch.softmax(x, -1),
    "logSoftmax": lambda x, p: torch.log_softmax(x, -1),
    "logSumExp": lambda x, p: torch.logsumexp(x, -1),
    "argmax": lambda x, p: torch.argmax(x, -1),
    "where": lambda c, a, b, p: torch.where(c, a, b),
    "cast": lambda x, p: x.to(torch.float32 if x.dtype == torch.bfloat16 else torch.bfloat16),
    "gatherRows": lambda t, i, p: F.embedding(i, t),
    "gatherLast": lambda x, i, p: x.gather(1, i.long().unsqueeze(1)),
    "linear": lambda x, w, *rest: F.linear(x, w, rest[0] if len(rest) > 1 else None),
    "rmsNorm": lambda x, w, p: F.rms_norm(x, (x.shape[-1],), w, p["eps"]),
    "rotaryEmbedding": rotary,
    "swiglu": lambda a, b, p: F.silu(a) * b,
    "groupedQueryAttention": attention,
    "loraLinear": lora,
    "vocabHead": head,
}


def make(spec, dtype, limit):
    shape = spec["shape"]
    if spec["kind"] == "int32":
        return torch.randint(0, limit, shape, dtype=torch.int32)
    if spec["kind"] == "bool":
        return torch.rand(shape) < 0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.rand(shape, dtype=wide) + 0.5
    x = x if spec["kind"] == "accumulator" else x.to(dtype)
    return x.mT.contiguous().mT if spec["layout"] == "transposed" else x


def sample(run, seconds):
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    times.sort()
    return {"best": times[0], "median": times[len(times) // 2]}


def function_of(work):
    op, params = work["op"], work.get("params", {})
    if op in UNARY:
        return lambda x: UNARY[op](x)
    if op in BINARY:
        return lambda a, b: BINARY[op](a, b)
    return (lambda *x: OPS[op](*x, params)) if op in OPS else None


def time_op(work):
    f = function_of(work)
    if f is None:
        return {}
    dtype = DTYPES[work["dtype"]]
    # Ids fall into the shortest table or row that they could be meant for.
    limit = min([s["shape"][0] for s in work["inputs"] if s["kind"] != "int32" and s["shape"]], default=1)
    inputs = [make(s, dtype, limit) for s in work["inputs"]]
    if not work["gradient"]:
        with torch.no_grad():
            return sample(lambda: f(*inputs), work["time"])
    variables = [x.requires_grad_() for x, s in zip(inputs, work["inputs"]) if x.is_floating_point() and not s["fixed"]]
    with torch.no_grad():
        y = f(*inputs)
    cotangents = [torch.ones_like(t) for t in (y if isinstance(y, list) else [y])]

    def run():
        for v in variables:
            v.grad = None
        y = f(*inputs)
        torch.autograd.backward(y if isinstance(y, list) else [y], cotangents)

    return sample(run, work["time"])


def latency(work):
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    x = torch.ones(work.get("size", 16), requires_grad=True)

    def gradient():
        x.grad = None
        (x * x).sum().backward()

    run = {"add": lambda: a + b, "gradient": gradient, "item": lambda: (a + b).sum().item()}[work["what"]]

    def many():
        for _ in range(1000):
            run()

    answer = sample(many, work["time"])
    return {key: value / 1000 for key, value in answer.items()}


def causal_model(config):
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "tie_word_embeddings", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    return LlamaForCausalLM(LlamaConfig(**{n: config[n] for n in names}, attn_implementation="sdpa"))


def with_adapters(model, rank):
    """PEFT's LoRA on every linear of the blocks, trained beside the backbone."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets))
    return model.requires_grad_(True)


@functools.lru_cache(maxsize=1)
def prepared_step(text):
    """One pass of a loss over padded-free batches of prompt + response, all positions through the head, as TRL does."""
    work = json.loads(text)
    model = causal_model(work["config"])
    if work.get("lora"):
        model = with_adapters(model, work["lora"])
    model.train(False)
    prompt, response, pairs, vocabulary = work["prompt"], work["response"], work["pairs"], work["config"]["vocab_size"]
    sequences = pairs if work["loss"] == "sft" else 2 * pairs
    ids = torch.randint(0, vocabulary, (sequences, prompt + response))
    reference = torch.zeros(sequences)

    def loss():
        logits = model(ids).logits[:, :-1]
        logps = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0][:, prompt - 1:].sum(1)
        if work["loss"] == "sft":
            return -logps.mean()
        margins = (logps - reference)[:pairs] - (logps - reference)[pairs:]
        return -F.logsigmoid(0.1 * margins).mean()

    def gradient():
        model.zero_grad(set_to_none=True)
        loss().backward()

    def value():
        with torch.no_grad():
            loss()

    return gradient if work["gradient"] else value


def step(work):
    """Times of a step, whose model stays for more samples of the same step."""
    work, count, times = dict(work), work["times"], []
    del work["times"]
    run = prepared_step(json.dumps(work, sort_keys=True))
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    times.sort()
    return {"best": times[0], "median": times[len(times) // 2],
            "peakBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    kinds = {"step": step, "latency": latency, "op": time_op}
    for line in sys.stdin:
        work = json.loads(line)
        try:
            answer = kinds[work.get("kind", "op")](work)
        except Exception as error:  # one piece of work must not end the run
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({k: v for k, v in answer.items() if not isinstance(v, float) or math.isfinite(v)}), flush=True)


main()
