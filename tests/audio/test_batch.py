"""Packing, checking and padding of batches; the golden inputs pass through."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from chroma_jax.audio.batch import Inputs, bucket, bucket_sizes, normalize_inputs, pack
from chroma_jax.audio.chat import Turn
from chroma_jax.audio.prompt import Processor
from chroma_jax.config import tiny

DATA = Path(__file__).parents[1] / "data"
CONFIG = tiny()
AUDIO = CONFIG.reasoner.audio_token_id
NAMES = {
    "question_ids": "thinker_input_ids",
    "question_mask": "thinker_attention_mask",
    "mel": "thinker_input_features",
    "mel_mask": "thinker_feature_attention_mask",
    "voice_ids": "input_ids",
    "voice_mask": "attention_mask",
    "voice_wave": "input_values",
    "voice_lengths": "input_values_cutoffs",
}


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    return load_file(DATA / "chroma-tiny" / "cases.safetensors")


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(CONFIG)


@pytest.mark.parametrize("case", ["single", "text_ends_early", "long_audio", "left_padded_batch"])
@pytest.mark.parametrize("kind", ["mapping", "dataclass"])
def test_goldens_pass(cases, case, kind):
    inputs = {name: cases[f"{case}/in/{theirs}"] for name, theirs in NAMES.items()}
    batch = normalize_inputs(CONFIG, Inputs(**inputs) if kind == "dataclass" else inputs)
    for i in range(len(batch.ids)):
        length, voice_length = batch.lengths[i], batch.voice_lengths[i]
        valid = inputs["question_mask"][i].astype(bool)
        assert length == valid.sum()
        np.testing.assert_array_equal(batch.ids[i, :length], inputs["question_ids"][i][valid])
        assert (batch.ids[i, length:] == CONFIG.reasoner.pad_token_id).all()
        mel = np.concatenate(
            [c[:n] for c, n in zip(batch.chunks[i], batch.chunk_lengths[i], strict=True)]
        )
        np.testing.assert_array_equal(mel, inputs["mel"][i].T[inputs["mel_mask"][i].astype(bool)])
        assert voice_length == inputs["voice_lengths"][i]
        np.testing.assert_array_equal(
            batch.voice_wave[i, :voice_length], inputs["voice_wave"][i, 0, :voice_length]
        )
        assert not batch.voice_wave[i, voice_length:].any()
        assert batch.voice_id_lengths[i] == inputs["voice_mask"][i].sum()
    assert batch.voice_wave.shape[1] % CONFIG.codec.frame_samples == 0
    assert {a.dtype for a in batch} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_left_padding_is_gone(cases):
    inputs = {name: cases[f"left_padded_batch/in/{theirs}"] for name, theirs in NAMES.items()}
    assert not inputs["question_mask"][1, 0]
    batch = normalize_inputs(CONFIG, inputs)
    assert batch.lengths.tolist() == [114, 72]
    assert batch.chunk_lengths.tolist() == [[200, 200, 11, 0], [200, 33, 0, 0]]


def noise(seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * 16000)).astype(
        np.float32
    ), 16000


def rows(processor: Processor) -> list:
    return [
        (processor.question([Turn(text="hi")]), processor.voice_arrays(noise(0.5), "a")),
        (processor.question(noise(1.0)), processor.voice_arrays(noise(3.0, 1), "longer words")),
        (
            processor.question(
                [
                    Turn(audio=noise(4.0)),
                    Turn(role="assistant", text="y"),
                    Turn(audio=noise(0.7, 2)),
                ]
            ),
            processor.voice_arrays(noise(1.0), "bc"),
        ),
    ]


@pytest.mark.parametrize(
    ("which", "mel_shape"),
    [([0], None), ([0, 1], (2, 128, 100)), ([0, 1, 2], (3, 2, 128, 400))],
    ids=["text", "one sound", "two sounds"],
)
def test_pack(processor, which, mel_shape):
    packed = pack([rows(processor)[i] for i in which])
    assert (packed.mel is None and mel_shape is None) or packed.mel.shape == mel_shape
    batch = normalize_inputs(CONFIG, packed)
    for row, i in enumerate(which):
        alone = normalize_inputs(CONFIG, pack([rows(processor)[i]]))
        question, voice = rows(processor)[i]
        np.testing.assert_array_equal(batch.ids[row, : batch.lengths[row]], question.ids)
        np.testing.assert_array_equal(
            batch.voice_ids[row, : batch.voice_id_lengths[row]], voice.ids
        )
        np.testing.assert_array_equal(batch.voice_wave[row, : batch.voice_lengths[row]], voice.wave)
        used = batch.chunk_lengths[row][batch.chunk_lengths[row] > 0]
        np.testing.assert_array_equal(used, alone.chunk_lengths[0][alone.chunk_lengths[0] > 0])
        np.testing.assert_array_equal(batch.chunks[row, : len(used)], alone.chunks[0, : len(used)])
        assert sum(used) == sum(map(len, question.mels))


def test_two_sounds_are_cut_apart(processor):
    batch = normalize_inputs(CONFIG, pack([rows(processor)[2]]))
    assert batch.chunk_lengths[0].tolist() == [200, 200, 70, 0]


def test_pack_nothing():
    with pytest.raises(ValueError, match="at least one row"):
        pack([])


def good(**changes) -> dict:
    """A batch of two rows: two sounds in the first, none in the second."""
    ids = np.full((2, 60), 65)
    ids[0, 5:30] = AUDIO
    ids[0, 40:43] = AUDIO
    mel = np.random.default_rng(0).standard_normal((2, 2, 128, 100)).astype(np.float32)
    mel_mask = np.zeros((2, 2, 100), int)
    mel_mask[0, 0] = 1
    mel_mask[0, 1, :12] = 1
    return {
        "question_ids": ids,
        "question_mask": np.ones((2, 60), int),
        "mel": mel,
        "mel_mask": mel_mask,
        "voice_ids": np.full((2, 4), 66),
        "voice_mask": np.ones((2, 4), bool),
        "voice_wave": np.full((2, 1, 5000), 0.1, np.float32),
        "voice_lengths": np.array([5000, 4000]),
    } | changes


def edit(name: str, index, value) -> dict:
    array = good()[name].copy()
    array[index] = value
    return good(**{name: array})


def without(*names: str) -> dict:
    return {name: value for name, value in good().items() if name not in names}


def test_good_passes():
    batch = normalize_inputs(CONFIG, good())
    assert batch.chunk_lengths.tolist() == [[100, 12], [0, 0]]
    assert batch.voice_lengths.tolist() == [5000, 4000]


def test_masks_and_lengths_are_optional():
    batch = normalize_inputs(CONFIG, without("question_mask", "voice_mask", "voice_lengths"))
    assert batch.voice_lengths.tolist() == [5000, 5000]
    text = {"question_ids": [[65, 66]], "voice_ids": [[65]], "voice_wave": [[0.5, 0.5]]}
    batch = normalize_inputs(CONFIG, text)
    assert batch.chunk_lengths.tolist() == [[0]]
    assert batch.chunks.shape == (1, 1, 200, 128)
    one = {"question_ids": [[AUDIO]], "mel": np.zeros((1, 128, 3))} | {
        k: text[k] for k in ("voice_ids", "voice_wave")
    }
    assert normalize_inputs(CONFIG, one).chunk_lengths.tolist() == [[3]]


@given(
    st.lists(st.booleans(), min_size=60, max_size=60),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_any_mask_pattern_is_compacted(question_mask, voice_mask):
    ids = np.arange(60)
    inputs = good(
        question_ids=np.stack([ids, ids]),
        question_mask=np.array([question_mask, [True] * 60]),
        voice_ids=np.stack([ids[:4], ids[:4]]),
        voice_mask=np.array([voice_mask, [True] * 4]),
        mel=None,
        mel_mask=None,
    )
    if not any(question_mask) or not any(voice_mask):
        with pytest.raises(ValueError, match="of row 0 has no valid tokens"):
            normalize_inputs(CONFIG, inputs)
        return
    batch = normalize_inputs(CONFIG, inputs)
    assert batch.ids[0, : batch.lengths[0]].tolist() == [i for i in range(60) if question_mask[i]]
    assert batch.voice_ids[0, : batch.voice_id_lengths[0]].tolist() == [
        i for i in range(4) if voice_mask[i]
    ]
    assert batch.ids[1, :60].tolist() == list(range(60))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "inputs must be an Inputs or a mapping with its fields, got NoneType"),
        (good(mels=1), "unknown inputs mels; wanted question_ids"),
        (without("question_ids"), "missing input question_ids"),
        (without("voice_ids"), "missing input voice_ids"),
        (without("voice_wave"), "missing input voice_wave"),
        (without("mel"), "mel_mask is given without mel"),
        (
            without("mel", "mel_mask"),
            "question_ids of row 0 has 28 audio placeholders .* its mel gives 0 features",
        ),
        (
            without("mel_mask"),
            "question_ids of row 0 has 28 audio placeholders .* its mel gives 50 features",
        ),
        (good(question_ids=np.zeros(5, int)), r"question_ids must have 2 axes, got shape \[5\]"),
        (good(question_ids=np.zeros((2, 60))), "question_ids must be integers, got float64"),
        (
            good(question_ids=np.zeros((0, 60), int)),
            "voice_ids has 2 rows, question_ids has 0|no rows",
        ),
        (
            good(question_mask=np.ones((2, 59), int)),
            r"question_mask must have shape \[2, 60\], got \[2, 59\]",
        ),
        (good(question_mask=np.full((2, 60), 2)), "question_mask must be bool or hold 0 and 1"),
        (
            good(question_mask=np.ones((2, 60))),
            "question_mask must be bool or hold 0 and 1, got float64",
        ),
        (edit("question_mask", 1, 0), "question_ids of row 1 has no valid tokens"),
        (
            edit("question_ids", (1, 3), 512),
            "question_ids of row 1 has id 512 outside the vocabulary of 512",
        ),
        (edit("question_ids", (1, 3), -1), "question_ids of row 1 has id -1 outside"),
        (
            edit("question_ids", (1, 3), AUDIO),
            "row 1 has 1 audio placeholders .* its mel gives 0 features",
        ),
        (
            edit("question_mask", (0, 5), 0),
            r"row 0 has 27 audio placeholders \(token 500\), .* gives 28 features",
        ),
        (edit("mel", (0, 1, 5, 5), np.nan), "mel of row 0 has NaN or infinite values"),
        (
            good(mel=np.zeros((2, 2, 80, 100))),
            r"mel must have 128 bins .* got shape \[2, 2, 80, 100\]",
        ),
        (good(mel=np.zeros((2, 2, 128, 100), int)), "mel must be floats, got int64"),
        (good(mel=np.zeros((3, 2, 128, 100))), "mel has 3 rows, question_ids has 2"),
        (
            good(mel=np.zeros((2, 128, 100))),
            r"mel_mask must have shape \[2, 100\], got \[2, 2, 100\]",
        ),
        (good(voice_ids=np.zeros((1, 4), int)), "voice_ids has 1 rows, question_ids has 2"),
        (edit("voice_mask", 0, 0), "voice_ids of row 0 has no valid tokens"),
        (edit("voice_ids", (1, 0), 600), "voice_ids of row 1 has id 600 outside the vocabulary"),
        (
            good(voice_wave=np.zeros((2, 2, 100))),
            r"voice_wave must be \[B, 1, N\] or \[B, N\], got shape \[2, 2, 100\]",
        ),
        (edit("voice_wave", (1, 0, 7), np.inf), "voice_wave of row 1 has NaN or infinite values"),
        (edit("voice_lengths", 1, 0), "voice_lengths of row 1 must lie from 1 to 5000, got 0"),
        (
            edit("voice_lengths", 0, 5001),
            "voice_lengths of row 0 must lie from 1 to 5000, got 5001",
        ),
        (good(voice_lengths=np.array([1.0, 2.0])), "voice_lengths must be integers, got float64"),
        (good(voice_lengths=np.array([1])), "voice_lengths has 1 rows"),
        (
            good(voice_ids=np.full((2, 2100), 66), voice_mask=None),
            "voice_wave of row 0: voice longer than the context",
        ),
        (
            good(question_ids=np.full((2, 4096), 65), question_mask=None, mel=None, mel_mask=None),
            "question_ids of row 0 too long: 4096 tokens",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        normalize_inputs(CONFIG, inputs)
    assert "\n" not in str(error.value)


def test_values_behind_the_masks_do_not_count():
    """Padding may hold anything: NaN, ids of other vocabularies."""
    inputs = edit("mel", (0, 1, slice(None), slice(12, None)), np.nan)
    inputs["voice_wave"][1, 0, 4000:] = np.nan
    inputs["question_ids"][1, 50:] = 10**6
    inputs["question_mask"][1, 50:] = 0
    got, want = normalize_inputs(CONFIG, inputs), normalize_inputs(CONFIG, good())
    np.testing.assert_array_equal(got.chunks, want.chunks)
    assert np.isfinite(got.voice_wave).all()
    assert got.lengths.tolist() == [60, 50]


def test_inputs_are_not_changed():
    inputs = good()
    normalize_inputs(CONFIG, inputs)
    for name, value in good().items():
        np.testing.assert_array_equal(inputs[name], value)


def test_bfloat16_is_a_float():
    import ml_dtypes

    inputs = good()
    inputs["mel"] = inputs["mel"].astype(ml_dtypes.bfloat16)
    assert normalize_inputs(CONFIG, inputs).chunks.dtype == np.float32


@pytest.mark.parametrize(
    ("n", "want"), [(0, 64), (1, 64), (64, 64), (65, 128), (129, 192), (200, 256), (4096, 4096)]
)
def test_bucket(n, want):
    assert bucket(n, bucket_sizes(64, 4096)) == want


def test_bucket_sizes():
    assert bucket_sizes(64, 1000) == (64, 128, 192, 256, 384, 512, 768, 1000)
    assert bucket_sizes(64, 64) == (64,)
    assert bucket_sizes(64, 10) == (10,)
    assert len(bucket_sizes(64, 32768)) < 20
    with pytest.raises(ValueError, match="length 11 is beyond the largest size 10"):
        bucket(11, (5, 10))
