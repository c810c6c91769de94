// What is measured: Qwen2.5-0.5B's and Llama-3.2-3B's shapes as their config.json have them, the sizes of the goals, and
// with --tiny the same work at sizes that a host can imitate, where only the harness is looked at.

const qwen = {
  architectures: ['Qwen2ForCausalLM'],
  model_type: 'qwen2',
  hidden_size: 896,
  intermediate_size: 4864,
  num_hidden_layers: 24,
  num_attention_heads: 14,
  num_key_value_heads: 2,
  vocab_size: 151_936,
  tie_word_embeddings: true,
  rope_theta: 1e6,
  rms_norm_eps: 1e-6,
  max_position_embeddings: 32_768,
  hidden_act: 'silu',
  initializer_range: 0.02,
};

const llama = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 3072,
  intermediate_size: 8192,
  num_hidden_layers: 28,
  num_attention_heads: 24,
  num_key_value_heads: 8,
  head_dim: 128,
  vocab_size: 128_256,
  tie_word_embeddings: true,
  rope_theta: 500_000,
  rms_norm_eps: 1e-5,
  max_position_embeddings: 131_072,
  hidden_act: 'silu',
  initializer_range: 0.02,
};

const shrunk = {
  hidden_size: 128,
  intermediate_size: 256,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  head_dim: 64,
  vocab_size: 512,
  max_position_embeddings: 256,
};

/** Sizes of all sections. */
export function sizes(tiny) {
  if (!tiny)
    return {
      qwen,
      llama,
      tokens: 8192,
      headRows: 4096,
      sequences: { count: 8, length: 1024 },
      optimized: 64 << 20,
      copied: 256 << 20,
      // Rotating among buffers of this many bytes in all keeps the L2 cache from answering.
      rotation: 256 << 20,
      dpo: { pairs: 4, prompt: 512, response: 512, steps: 10 },
      large: { pairs: 2, prompt: 512, response: 512, steps: 4 },
    };
  return {
    qwen: { ...qwen, ...shrunk },
    llama: { ...llama, ...shrunk },
    tokens: 32,
    headRows: 16,
    sequences: { count: 2, length: 16 },
    optimized: 1024,
    copied: 4096,
    rotation: 1,
    dpo: { pairs: 2, prompt: 4, response: 4, steps: 3 },
    large: { pairs: 1, prompt: 4, response: 4, steps: 3 },
  };
}
