"""Stand-ins for other packs' models, for the templates: see README.md."""

from .captioner import StandInCaptioner
from .segmenter import StandInSegmenter
from .speech import StandInSpeech, StandInSpeechLoader

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "qmoveStandInCaptioner": StandInCaptioner,
    "qmoveStandInSegmenter": StandInSegmenter,
    "qmoveStandInSpeechLoader": StandInSpeechLoader,
    "qmoveStandInSpeech": StandInSpeech,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "qmoveStandInCaptioner": "Captioner (stand-in)",
    "qmoveStandInSegmenter": "Segmenter (stand-in)",
    "qmoveStandInSpeechLoader": "Load Speech (stand-in)",
    "qmoveStandInSpeech": "Speech (stand-in)",
}
