"""Sizes without a file: the published model, and one for tests."""

from __future__ import annotations

import dataclasses

from chroma_jax.config.types import (
    AudioEncoderConfig,
    BackboneConfig,
    ChromaConfig,
    CodecConfig,
    DecoderConfig,
    Llama3Rope,
    LlamaConfig,
    ReasonerConfig,
    RopeConfig,
)


def chroma_4b() -> ChromaConfig:
    """The published sizes of FlashLabs/Chroma-4B (arXiv 2601.11141; the checkpoint's config.json has the last word).

    Reasoner 4.0 B without the vision tower, Backbone 1.0 B, Decoder 0.16 B, Codec 79 M.
    """
    speech_rope = dict(theta=500000.0)
    return ChromaConfig(
        reasoner=ReasonerConfig(
            text=LlamaConfig(
                hidden_size=2048,
                intermediate_size=11008,
                num_layers=36,
                num_heads=16,
                num_kv_heads=2,
                head_dim=128,
                max_positions=32768,
                norm_eps=1e-6,
                rope=RopeConfig(theta=1e6, sections=(16, 24, 24)),
                qkv_bias=True,
            ),
            audio=AudioEncoderConfig(
                num_mel_bins=128,
                hidden_size=1280,
                intermediate_size=5120,
                num_layers=32,
                num_heads=20,
                window=100,
                output_size=2048,
            ),
            vocab_size=151936,
            tie_embeddings=False,
            audio_token_id=151646,
            audio_start_token_id=151647,
            audio_end_token_id=151648,
            pad_token_id=151643,
        ),
        backbone=BackboneConfig(
            llama=LlamaConfig(
                hidden_size=2048,
                intermediate_size=8192,
                num_layers=16,
                num_heads=32,
                num_kv_heads=8,
                head_dim=64,
                max_positions=2048,
                norm_eps=1e-5,
                rope=RopeConfig(**speech_rope),
            ),
            num_codebooks=8,
            vocab_size=2051,
        ),
        decoder=DecoderConfig(
            llama=LlamaConfig(
                hidden_size=1024,
                intermediate_size=8192,
                num_layers=4,
                num_heads=8,
                num_kv_heads=2,
                head_dim=128,
                max_positions=33,
                norm_eps=1e-5,
                rope=RopeConfig(**speech_rope),
            ),
            num_codebooks=8,
            vocab_size=2051,
            embedding_size=2048,
        ),
        codec=CodecConfig(
            sampling_rate=24000,
            frame_rate=12.5,
            audio_channels=1,
            hidden_size=512,
            num_filters=64,
            num_residual_layers=1,
            upsampling_ratios=(8, 6, 5, 4),
            kernel_size=7,
            last_kernel_size=3,
            residual_kernel_size=3,
            dilation_growth_rate=2,
            compress=2,
            pad_mode="constant",
            trim_right_ratio=1.0,
            use_conv_shortcut=False,
            upsample_groups=512,
            codebook_size=2048,
            codebook_dim=256,
            quantizer_size=256,
            num_quantizers=8,
            num_semantic_quantizers=1,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=2048,
            norm_eps=1e-5,
            rope=RopeConfig(theta=10000.0),
            sliding_window=250,
            layer_scale_initial=0.01,
        ),
        text_start_token_id=151665,
        text_end_token_id=151666,
        im_end_token_id=151645,
        codebook_pad_token_id=2050,
        codebook_eos_token_id=0,
    )


def mini_codec() -> CodecConfig:
    """A Mimi of 3.2 million weights that trains and runs on CPUs: 8 codebooks of 512, 12.5 frames a second, 0.9 kbit/s.

    Strides are longest where the rate is highest, which halves the operations of Mimi's order.
    """
    return dataclasses.replace(
        chroma_4b().codec,
        hidden_size=192,
        num_filters=16,
        upsampling_ratios=(4, 5, 6, 8),
        upsample_groups=192,
        codebook_size=512,
        codebook_dim=64,
        quantizer_size=64,
        num_layers=2,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        intermediate_size=512,
        sliding_window=32,
        layer_scale_initial=0.1,
    )


def chroma_100m() -> ChromaConfig:
    """The structure of Chroma-4B at 113 M weights, to measure speed where Chroma-4B does not fit: no such model is trained.

    Reasoner 58 M, Backbone 28 M, Decoder 11 M, Codec 16 M.
    """
    big = chroma_4b()
    replace = dataclasses.replace
    return replace(
        big,
        reasoner=replace(
            big.reasoner,
            text=replace(
                big.reasoner.text,
                hidden_size=512,
                intermediate_size=2560,
                num_layers=9,
                num_heads=8,
                head_dim=64,
                rope=RopeConfig(theta=1e6, sections=(8, 12, 12)),
            ),
            audio=replace(
                big.reasoner.audio,
                hidden_size=384,
                intermediate_size=1536,
                num_layers=4,
                num_heads=6,
                output_size=512,
            ),
            vocab_size=8192,
            audio_token_id=8130,
            audio_start_token_id=8131,
            audio_end_token_id=8132,
            pad_token_id=8133,
        ),
        backbone=replace(
            big.backbone,
            llama=replace(
                big.backbone.llama,
                hidden_size=512,
                intermediate_size=2048,
                num_layers=5,
                num_heads=8,
                num_kv_heads=2,
            ),
        ),
        decoder=replace(
            big.decoder,
            llama=replace(
                big.decoder.llama, hidden_size=256, intermediate_size=2048, num_heads=4, head_dim=64
            ),
            embedding_size=512,
        ),
        codec=replace(
            big.codec,
            hidden_size=256,
            num_filters=32,
            upsample_groups=256,
            codebook_dim=128,
            quantizer_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            intermediate_size=1024,
        ),
        text_start_token_id=8140,
        text_end_token_id=8141,
        im_end_token_id=8142,
    )


def tiny() -> ChromaConfig:
    """A complete Chroma of about half a million weights, for tests and for trying the tools: it cannot speak."""
    big = chroma_4b()
    replace = dataclasses.replace
    speech_rope = Llama3Rope(
        factor=32.0, low_freq_factor=0.125, high_freq_factor=0.5, original_max_positions=1024
    )
    frame_rope = Llama3Rope(
        factor=32.0,
        low_freq_factor=0.001953125,
        high_freq_factor=0.0078125,
        original_max_positions=16,
    )
    text = replace(
        big.reasoner.text,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=4,
        head_dim=16,
        max_positions=4096,
        rope=RopeConfig(theta=1e6, sections=(2, 3, 3)),
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(
            text=text,
            audio=replace(
                big.reasoner.audio,
                hidden_size=48,
                intermediate_size=96,
                num_layers=2,
                num_heads=4,
                output_size=64,
            ),
            vocab_size=512,
            tie_embeddings=False,
            audio_token_id=500,
            audio_start_token_id=503,
            audio_end_token_id=504,
            pad_token_id=506,
        ),
        backbone=BackboneConfig(
            llama=replace(
                big.backbone.llama,
                hidden_size=64,
                intermediate_size=128,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                rope=RopeConfig(theta=5e5, llama3=speech_rope),
            ),
            num_codebooks=8,
            vocab_size=67,
        ),
        decoder=DecoderConfig(
            llama=replace(
                big.decoder.llama,
                hidden_size=32,
                intermediate_size=64,
                num_layers=2,
                num_heads=4,
                head_dim=8,
                rope=RopeConfig(theta=5e5, llama3=frame_rope),
            ),
            num_codebooks=8,
            vocab_size=67,
            embedding_size=64,
        ),
        codec=replace(
            big.codec,
            hidden_size=32,
            num_filters=4,
            upsample_groups=32,
            codebook_size=64,
            codebook_dim=16,
            quantizer_size=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            intermediate_size=64,
        ),
        text_start_token_id=509,
        text_end_token_id=510,
        im_end_token_id=511,
        codebook_pad_token_id=66,
        codebook_eos_token_id=0,
    )


def debug() -> ChromaConfig:
    """A complete Chroma of 1.4 million weights, which learns a few spoken answers by heart on two CPU cores (`configs/debug.py`)."""
    small = tiny()
    replace = dataclasses.replace
    width = 128
    return replace(
        small,
        reasoner=replace(
            small.reasoner,
            text=replace(
                small.reasoner.text,
                hidden_size=width,
                intermediate_size=256,
                num_layers=2,
                head_dim=32,
                rope=RopeConfig(theta=1e6, sections=(4, 6, 6)),
            ),
            audio=replace(
                small.reasoner.audio, hidden_size=64, intermediate_size=128, output_size=width
            ),
        ),
        backbone=replace(
            small.backbone,
            llama=replace(
                small.backbone.llama,
                hidden_size=width,
                intermediate_size=384,
                head_dim=32,
                rope=RopeConfig(theta=1e4),
            ),
        ),
        decoder=replace(
            small.decoder,
            llama=replace(
                small.decoder.llama,
                hidden_size=96,
                intermediate_size=192,
                head_dim=24,
                rope=RopeConfig(theta=1e4),
            ),
            embedding_size=width,
        ),
    )


def mini() -> ChromaConfig:
    """A Chroma of 30 million weights that two CPU cores train and run in real time (`configs/mini_speech.py`).

    Reasoner 19 M, Backbone 6 M, Decoder 2 M, Codec 3 M. Of the Reasoner 14 M are ears: the first four layers of a Whisper base
    (`chroma_jax.checkpoint.whisper`), over chunks of one second, so that little is left to hear when a question ends.
    """
    big = chroma_4b()
    replace = dataclasses.replace
    width = 256
    text = replace(
        big.reasoner.text,
        hidden_size=width,
        intermediate_size=768,
        num_layers=6,
        num_heads=4,
        head_dim=64,
        max_positions=2048,
        rope=RopeConfig(theta=1e4, sections=(8, 12, 12)),
    )
    audio = replace(
        big.reasoner.audio,
        num_mel_bins=80,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=4,
        num_heads=8,
        window=50,
        output_size=width,
    )
    return replace(
        big,
        reasoner=replace(
            big.reasoner,
            text=text,
            audio=audio,
            vocab_size=2048,
            audio_token_id=2040,
            audio_start_token_id=2041,
            audio_end_token_id=2042,
            pad_token_id=2043,
        ),
        backbone=replace(
            big.backbone,
            llama=replace(
                big.backbone.llama,
                hidden_size=width,
                intermediate_size=768,
                num_layers=6,
                num_heads=4,
                num_kv_heads=2,
                max_positions=1024,
                rope=RopeConfig(theta=1e4),
            ),
            vocab_size=515,
        ),
        decoder=replace(
            big.decoder,
            llama=replace(
                big.decoder.llama,
                hidden_size=192,
                intermediate_size=512,
                num_layers=3,
                num_heads=3,
                num_kv_heads=1,
                head_dim=64,
                rope=RopeConfig(theta=1e4),
            ),
            vocab_size=515,
            embedding_size=width,
        ),
        codec=mini_codec(),
        text_start_token_id=2044,
        text_end_token_id=2045,
        im_end_token_id=2046,
        codebook_pad_token_id=514,
    )
