"""How a base that translates is told from which language into which: by words before the source.

T5 was trained on `translate English to German: ` and the like (Raffel et al. 2020, appendix D); mT5 on no such words,
so that any will do, and those are T5's. A Marian model for several languages reads `>>deu<< ` (Tiedemann & Thottingal
2020), and knows which. BART has no words for a language.
"""

from __future__ import annotations

#: By ISO 639-1, as T5's tasks spell them.
NAMES: dict[str, str] = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician",
    "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh",
    "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian",
    "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "my": "Burmese", "ne": "Nepali",
    "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip

#: By family; of those that are not here no language can be asked for.
_TEMPLATES = {
    "t5": "translate {source_name} to {target_name}: ",
    "mt5": "translate {source_name} to {target_name}: ",
    "marian": ">>{target}<< ",
}


def speaks(family: str) -> bool:
    """Whether bases of this family are told languages."""
    return family in _TEMPLATES


def prefix(family: str, source: str, target: str) -> str:
    """What stands before a source. source, target: a code of `NAMES`, or a language's name; of Marian the base's own
    codes. KeyError of a family that is told none."""
    names = {"source_name": NAMES.get(source, source), "target_name": NAMES.get(target, target)}
    return _TEMPLATES[family].format(**names, target=target)
