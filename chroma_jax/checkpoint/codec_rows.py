"""Where the Codec's tensors of a Chroma checkpoint (`codec_model.*`) stand in our model.

The names are those of every published Mimi in transformers' layout, whatever its sizes.
"""

from __future__ import annotations

from chroma_jax.checkpoint.transforms import Row

_SEANET = r"codec_model\.(encoder|decoder)\.layers\.(\d+)\."
_LAYER = r"codec_model\.(encoder|decoder)_transformer\.layers\.(?P<layer>\d+)\."
_QUANTIZER = r"codec_model\.quantizer\.(semantic|acoustic)_residual_vector_quantizer\."

CODEC_ROWS: tuple[Row, ...] = (
    # Which of the decoder's layers are transposed convolutions depends on the number of residual layers.
    Row(_SEANET + r"conv\.weight", r"codec/\1/layers/\2/kernel", "conv_either"),
    Row(_SEANET + r"conv\.bias", r"codec/\1/layers/\2/bias"),
    Row(_SEANET + r"block\.1\.conv\.weight", r"codec/\1/layers/\2/dilated/kernel", "conv"),
    Row(_SEANET + r"block\.1\.conv\.bias", r"codec/\1/layers/\2/dilated/bias"),
    Row(_SEANET + r"block\.3\.conv\.weight", r"codec/\1/layers/\2/pointwise/kernel", "conv"),
    Row(_SEANET + r"block\.3\.conv\.bias", r"codec/\1/layers/\2/pointwise/bias"),
    Row(_SEANET + r"shortcut\.conv\.weight", r"codec/\1/layers/\2/shortcut/kernel", "conv"),
    Row(_SEANET + r"shortcut\.conv\.bias", r"codec/\1/layers/\2/shortcut/bias"),
    Row(r"codec_model\.downsample\.conv\.weight", "codec/downsample/kernel", "conv"),
    Row(r"codec_model\.upsample\.conv\.weight", "codec/upsample/kernel", "conv_transpose"),
    Row(_LAYER + r"input_layernorm\.weight", r"codec/\1_transformer/layers/attn_norm/scale"),
    Row(_LAYER + r"input_layernorm\.bias", r"codec/\1_transformer/layers/attn_norm/bias"),
    Row(_LAYER + r"self_attn\.([qkv])_proj\.weight", r"codec/\1_transformer/layers/\3", "linear"),
    Row(_LAYER + r"self_attn\.o_proj\.weight", r"codec/\1_transformer/layers/o", "linear_in"),
    Row(_LAYER + r"self_attn_layer_scale\.scale", r"codec/\1_transformer/layers/attn_scale"),
    Row(
        _LAYER + r"post_attention_layernorm\.weight", r"codec/\1_transformer/layers/mlp_norm/scale"
    ),
    Row(_LAYER + r"post_attention_layernorm\.bias", r"codec/\1_transformer/layers/mlp_norm/bias"),
    Row(_LAYER + r"mlp\.fc1\.weight", r"codec/\1_transformer/layers/up", "linear"),
    Row(_LAYER + r"mlp\.fc2\.weight", r"codec/\1_transformer/layers/down", "linear"),
    Row(_LAYER + r"mlp_layer_scale\.scale", r"codec/\1_transformer/layers/mlp_scale"),
    Row(_QUANTIZER + r"input_proj\.weight", r"codec/quantizer/\1/input_proj", "pointwise"),
    Row(_QUANTIZER + r"output_proj\.weight", r"codec/quantizer/\1/output_proj", "pointwise"),
    Row(
        _QUANTIZER + r"layers\.(?P<layer>\d+)\.codebook\.(embed_sum|cluster_usage|initialized)",
        r"codec/quantizer/\1/\3",
    ),
)
