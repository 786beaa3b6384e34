"""Qwen3: the network, top to bottom.

Attributes are named as in the checkpoint; q, k, v and gate, up are fused into one product each.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.attention.backend import AttentionStep
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.linear import Linear, LinearLayer, LinearMaker
from folovllm.worker_proc.layers.norm import HeadNorm, RMSNorm
from folovllm.worker_proc.layers.parts import LayerParts, NetworkParts
from folovllm.worker_proc.layers.rotary import HeadRotation, RotaryTable


class Qwen3ForCausalLM:
    """Qwen3 with its language model head. Each query and key head is normed before it is rotated."""

    def __init__(self, config: ModelConfig, placement: Placement, max_model_len: int, linears: LinearMaker) -> None:
        self.model = Qwen3Model(config, placement, max_model_len, linears)
        self._tied = config.tie_word_embeddings
        self.lm_head: LinearLayer
        if self._tied:
            self.lm_head = Linear.tied(self.model.embed_tokens, placement)
        else:
            self.lm_head = linears("", config.hidden_size, {"lm_head": config.vocab_size})

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        """Token ids [T] and their positions [T] (int64) → hidden states [T, hidden_size], the last norm applied."""
        return self.model.forward(input_ids, positions, attention)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, hidden_size] → logits [R, vocab_size], of the weights' type."""
        return self.lm_head(hidden)

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor a checkpoint must hold: its name, and the view that it is copied into."""
        yield from self.model.checkpoint_tensors("model.")
        yield from self.lm_head.checkpoint_tensors("")

    def spare_tensors(self) -> frozenset[str]:
        """Tensors a checkpoint may hold that do not count: with tied embeddings, a copy of them as head."""
        return frozenset({"lm_head.weight"}) if self._tied else frozenset()

    def finish_loading(self) -> None:
        """To be called once all tensors are filled: brings weights into their fastest layout."""
        for layer in self.model.layers:
            layer.finish_loading()
        self.lm_head.pack()

    def parts(self) -> NetworkParts:
        """What it is made of, for code that computes whole steps."""
        model = self.model
        layers = [layer.parts() for layer in model.layers]
        return NetworkParts(model.embed_tokens, model.rotary, layers, model.norm, self.lm_head)


class Qwen3Model:
    def __init__(self, config: ModelConfig, placement: Placement, max_model_len: int, linears: LinearMaker) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        self.layers = [
            Qwen3DecoderLayer(config, index, placement, linears) for index in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.rotary = RotaryTable(config.rope, config.head_dim, max_model_len, placement)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        hidden = F.embedding(input_ids, self.embed_tokens)
        rotation = self.rotary.rows(positions)
        for layer in self.layers:
            hidden = layer.forward(hidden, rotation, attention)
        return self.norm(hidden)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{prefix}embed_tokens.weight", self.embed_tokens
        for index, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"{prefix}layers.{index}.")
        yield f"{prefix}norm.weight", self.norm.weight


class Qwen3DecoderLayer:
    def __init__(self, config: ModelConfig, index: int, placement: Placement, linears: LinearMaker) -> None:
        self.self_attn = Qwen3Attention(config, index, placement, linears)
        self.mlp = Qwen3MLP(config, index, linears)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)

    def forward(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attention: AttentionStep
    ) -> torch.Tensor:
        self.self_attn.add_to(hidden, self.input_layernorm, rotation, attention)
        self.mlp.add_to(hidden, self.post_attention_layernorm)
        return hidden

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{prefix}input_layernorm.weight", self.input_layernorm.weight
        yield from self.self_attn.checkpoint_tensors(f"{prefix}self_attn.")
        yield f"{prefix}post_attention_layernorm.weight", self.post_attention_layernorm.weight
        yield from self.mlp.checkpoint_tensors(f"{prefix}mlp.")

    def finish_loading(self) -> None:
        self.self_attn.finish_loading()
        self.mlp.finish_loading()

    def parts(self) -> LayerParts:
        attention, mlp = self.self_attn, self.mlp
        return LayerParts(
            self.input_layernorm,
            attention.qkv_proj,
            attention.qk_norm,
            attention.o_proj,
            self.post_attention_layernorm,
            mlp.gate_up_proj,
            mlp.down_proj,
        )


class Qwen3Attention:
    def __init__(self, config: ModelConfig, index: int, placement: Placement, linears: LinearMaker) -> None:
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        prefix = f"model.layers.{index}.self_attn."
        self.qkv_proj = linears(prefix, config.hidden_size, projections, bias=config.attention_bias)
        self.o_proj = linears(prefix, q_size, {"o_proj": config.hidden_size}, bias=config.attention_bias)
        self.qk_norm = HeadNorm(self.num_heads, self.num_kv_heads, self.head_dim, config.rms_norm_eps, placement)
        self.rotate = HeadRotation(placement, self.qk_norm)

    def add_to(
        self,
        hidden: torch.Tensor,
        norm: RMSNorm,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionStep,
    ) -> None:
        """Adds the attention's output to `hidden` [T, hidden_size], of which it sees the normed."""
        heads = self.qkv_proj.of_normed(hidden, norm)
        heads = heads.unflatten(1, (-1, self.head_dim))  # [T, q heads + k heads + v heads, head_dim]
        self.rotate(heads[:, : self.num_heads + self.num_kv_heads], rotation)
        output = attention.attend(self.index, heads[:, : self.num_heads], heads[:, self.num_heads :])
        self.o_proj.add_to(hidden, output)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.qkv_proj.checkpoint_tensors(prefix)
        yield from self.o_proj.checkpoint_tensors(prefix)
        yield f"{prefix}q_norm.weight", self.qk_norm.q_weight
        yield f"{prefix}k_norm.weight", self.qk_norm.k_weight

    def finish_loading(self) -> None:
        self.qkv_proj.pack()
        self.o_proj.pack()
        self.qk_norm.spread()


class Qwen3MLP:
    def __init__(self, config: ModelConfig, index: int, linears: LinearMaker) -> None:
        size, prefix = config.intermediate_size, f"model.layers.{index}.mlp."
        self.gate_up_proj = linears(prefix, config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = linears(prefix, size, {"down_proj": config.hidden_size})

    def add_to(self, hidden: torch.Tensor, norm: RMSNorm) -> None:
        """Adds the MLP's output to `hidden` [T, hidden_size], of which it sees the normed."""
        self.down_proj.add_to(hidden, self.gate_up_proj.gated(hidden, norm))

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.gate_up_proj.checkpoint_tensors(prefix)
        yield from self.down_proj.checkpoint_tensors(prefix)

    def finish_loading(self) -> None:
        self.gate_up_proj.pack()
        self.down_proj.pack()
