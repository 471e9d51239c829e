"""The typed configurations: what each stage needs to know, checked when it is made."""

from __future__ import annotations

import dataclasses

MAX_INT = 2**31 - 1  # what an int32 id or length holds
REMAT = ("none", "full", "dots", "all_dots")
QUANTIZED = ("int8", "fp8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3's frequency-dependent stretch of rotary wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one transformer.

    `sections` splits the head_dim / 2 frequencies between the three position components (time, height, width) of
    TM-RoPE; None means ordinary one-component positions.
    """

    theta: float
    llama3: Llama3Rope | None = None
    sections: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One LLaMA stack: Reasoner text model, Backbone and Decoder are three of these.

    `remat`: what a layer keeps for its gradient. "none": everything; "full": only its input, the rest is computed again;
    "dots": results of products with weights; "all_dots": those of attention too. It changes no number.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.rope.sections is not None and sum(self.rope.sections) != self.head_dim // 2:
            raise ValueError(
                f"mrope_section {list(self.rope.sections)} must sum to head_dim / 2 = {self.head_dim // 2}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """The Reasoner's Whisper-style audio encoder, run on independent chunks of `2 * window` mel frames."""

    num_mel_bins: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    window: int
    output_size: int
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"audio encoder d_model {self.hidden_size} is no multiple of its {self.num_heads} heads"
            )
        if self.hidden_size % 2 or self.hidden_size < 4:
            raise ValueError(
                f"audio encoder d_model must be even and at least 4 for sinusoidal positions, got {self.hidden_size}"
            )
        if self.window % 2:
            raise ValueError(f"audio encoder n_window must be even, got {self.window}")

    @property
    def chunk_frames(self) -> int:
        """Mel frames per chunk (200, two seconds, in the released model)."""
        return 2 * self.window

    @property
    def chunk_features(self) -> int:
        """Features that a full chunk gives (50, 25 per second, in the released model)."""
        return self.window // 2

    def num_features(self, mel_frames: int) -> int:
        """Number of features, and of audio placeholders in the prompt, for a clip of `mel_frames`."""
        return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasonerConfig:
    """Qwen2.5-Omni Thinker without its vision tower."""

    text: LlamaConfig
    audio: AudioEncoderConfig
    vocab_size: int
    tie_embeddings: bool
    audio_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int
    pad_token_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """LLaMA over the interleaved sequence; predicts code 0 and owns the audio embedding table."""

    llama: LlamaConfig
    num_codebooks: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Small LLaMA that predicts codes 1..Q-1 inside one frame.

    `shared_first_position`: the Backbone state and code 0 share rotary position 0, as in the reference's generation;
    otherwise positions count from 0, as in the reference's training forward (see `model/decoder.py`).
    """

    llama: LlamaConfig
    num_codebooks: int
    vocab_size: int
    embedding_size: int
    shared_first_position: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Mimi: causal SEANet encoder and decoder, two sliding-window transformers, split residual quantizer."""

    sampling_rate: int
    frame_rate: float
    audio_channels: int
    hidden_size: int
    num_filters: int
    num_residual_layers: int
    upsampling_ratios: tuple[int, ...]
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    dilation_growth_rate: int
    compress: int
    pad_mode: str
    trim_right_ratio: float
    use_conv_shortcut: bool
    upsample_groups: int
    codebook_size: int
    codebook_dim: int
    quantizer_size: int
    num_quantizers: int
    num_semantic_quantizers: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    sliding_window: int
    layer_scale_initial: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.audio_channels != 1:
            raise ValueError(f"codec audio_channels must be 1 (mono), got {self.audio_channels}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"codec num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if not 0 < self.num_semantic_quantizers < self.num_quantizers:
            raise ValueError(
                f"codec num_semantic_quantizers {self.num_semantic_quantizers} must lie between 0 and "
                f"num_quantizers {self.num_quantizers}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"codec head_dim must be even for rotary embeddings, got {self.head_dim}"
            )
        if self.hidden_size % self.upsample_groups:
            raise ValueError(
                f"codec hidden_size {self.hidden_size} is no multiple of upsample_groups {self.upsample_groups}"
            )
        samples = self.sampling_rate / self.frame_rate
        if not samples < MAX_INT or samples < self.encoder_hop or samples % self.encoder_hop:
            raise ValueError(
                f"codec frame_rate {self.frame_rate} and sampling_rate {self.sampling_rate} do not fit "
                f"upsampling_ratios {list(self.upsampling_ratios)}"
            )

    @property
    def encoder_hop(self) -> int:
        """Samples per position of the codec's transformers (960, 25 Hz, in Mimi)."""
        hop = 1
        for ratio in self.upsampling_ratios:
            hop *= ratio
        return hop

    @property
    def downsample(self) -> int:
        """Transformer positions per frame (2 in Mimi)."""
        return int(self.sampling_rate / self.frame_rate) // self.encoder_hop

    @property
    def frame_samples(self) -> int:
        """Samples per frame (1920, 80 ms, in Mimi)."""
        return self.encoder_hop * self.downsample


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChromaConfig:
    """The whole system. Token ids are the checkpoint's own.

    quantized: "int8" or "fp8" where kernels and tables are held in eight bits, for generation (see `model/quantized.py`).
    """

    reasoner: ReasonerConfig
    backbone: BackboneConfig
    decoder: DecoderConfig
    codec: CodecConfig
    text_start_token_id: int
    text_end_token_id: int
    im_end_token_id: int
    codebook_pad_token_id: int
    codebook_eos_token_id: int
    quantized: str | None = None

    def __post_init__(self):
        if self.quantized is not None and self.quantized not in QUANTIZED:
            raise ValueError(f"quantize must be {' or '.join(QUANTIZED)}, got {self.quantized!r}")
        width = self.backbone.llama.hidden_size
        checks = (
            ("thinker text hidden_size", self.reasoner.text.hidden_size, "backbone hidden_size", width),
            ("decoder audio_embedding_dim", self.decoder.embedding_size, "backbone hidden_size", width),
            ("audio encoder output_dim", self.reasoner.audio.output_size, "thinker text hidden_size",
             self.reasoner.text.hidden_size),
            ("decoder audio_num_codebooks", self.decoder.num_codebooks, "backbone audio_num_codebooks",
             self.backbone.num_codebooks),
            ("decoder vocab_size", self.decoder.vocab_size, "backbone vocab_size", self.backbone.vocab_size),
        )  # fmt: skip
        for name, got, other, want in checks:
            if got != want:
                raise ValueError(f"{name} is {got} but {other} is {want}: they must be equal")
        if self.codec.num_quantizers < self.num_codebooks:
            raise ValueError(
                f"codec num_quantizers {self.codec.num_quantizers} is less than "
                f"audio_num_codebooks {self.num_codebooks}"
            )
        if self.decoder.llama.max_positions < self.num_codebooks:
            raise ValueError(
                f"decoder max_position_embeddings {self.decoder.llama.max_positions} is less than "
                f"audio_num_codebooks {self.num_codebooks}"
            )
        if self.backbone.vocab_size < self.codec.codebook_size:
            raise ValueError(
                f"backbone vocab_size {self.backbone.vocab_size} is less than "
                f"codec codebook_size {self.codec.codebook_size}"
            )
        text_ids = ("text_start_token_id", "text_end_token_id", "im_end_token_id")
        reasoner_ids = (
            "audio_token_id",
            "audio_start_token_id",
            "audio_end_token_id",
            "pad_token_id",
        )
        code_ids = ("codebook_pad_token_id", "codebook_eos_token_id")
        for owner, names, size, what in (
            (self, text_ids, self.reasoner.vocab_size, "text"),
            (self.reasoner, reasoner_ids, self.reasoner.vocab_size, "text"),
            (self, code_ids, self.backbone.vocab_size, "audio"),
        ):
            for name in names:
                if not 0 <= getattr(owner, name) < size:
                    raise ValueError(
                        f"{name} {getattr(owner, name)} lies outside the {what} vocabulary of {size}"
                    )

    @property
    def num_codebooks(self) -> int:
        """Codes per frame, Q."""
        return self.backbone.num_codebooks

    def with_dtype(self, dtype: str, param_dtype: str | None = None) -> ChromaConfig:
        """The same model computing in `dtype`, holding parameters in `param_dtype` (default: `dtype`).

        The Codec stays in float32: it is 2 % of the weights, and its nearest-neighbour search is not robust to
        rounding. Raises ValueError for a dtype other than float32, bfloat16 or float16.
        """
        param_dtype = param_dtype or dtype
        for name in (dtype, param_dtype):
            if name not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
        cast = {"dtype": dtype, "param_dtype": param_dtype}
        replace = dataclasses.replace
        return replace(
            self,
            reasoner=replace(
                self.reasoner,
                text=replace(self.reasoner.text, **cast),
                audio=replace(self.reasoner.audio, **cast),
            ),
            backbone=replace(self.backbone, llama=replace(self.backbone.llama, **cast)),
            decoder=replace(self.decoder, llama=replace(self.decoder.llama, **cast)),
        )

    def with_quantized(self, kind: str | None) -> ChromaConfig:
        """The same model with kernels and tables held in `kind`, or as they are for None. Raises ValueError for another kind."""
        return dataclasses.replace(self, quantized=kind)
