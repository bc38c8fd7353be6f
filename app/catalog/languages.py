"""How a base that translates is told from which language into which: by words before the source, or by tokens.

T5 was trained on `translate English to German: ` and the like (Raffel et al. 2020, appendix D); mT5 on no such words,
so that any will do, and those are T5's. A Marian model for several languages reads `>>deu<< ` (Tiedemann & Thottingal
2020), and knows which. BART has no words for a language. mBART-50, M2M-100 and NLLB-200 begin both texts with a token
of their language, mBART-25 ends them with it; their tokenizers put it there, and each has codes of its own (`en_XX`,
`en`, `eng_Latn`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from app.catalog.families import FAMILIES

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

#: Of which mBART-50's tokenizer has tokens, in the order of their ids (Tang et al. 2020).
MBART_50: tuple[str, ...] = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX",
    "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN",
    "zh_CN", "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK", "ml_IN",
    "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA",
    "ur_PK", "xh_ZA", "gl_ES", "sl_SI",
)  # fmt: skip

#: And mBART-25's (Liu et al. 2020).
MBART_25: tuple[str, ...] = MBART_50[:25]

#: The same of M2M-100's (Fan et al. 2021), and of those for WMT 2021 that use its tokenizer.
M2M_100: tuple[str, ...] = (
    "af", "am", "ar", "ast", "az", "ba", "be", "bg", "bn", "br", "bs", "ca", "ceb", "cs", "cy", "da", "de", "el",
    "en", "es", "et", "fa", "ff", "fi", "fr", "fy", "ga", "gd", "gl", "gu", "ha", "he", "hi", "hr", "ht", "hu",
    "hy", "id", "ig", "ilo", "is", "it", "ja", "jv", "ka", "kk", "km", "kn", "ko", "lb", "lg", "ln", "lo", "lt",
    "lv", "mg", "mk", "ml", "mn", "mr", "ms", "my", "ne", "nl", "no", "ns", "oc", "or", "pa", "pl", "ps", "pt",
    "ro", "ru", "sd", "si", "sk", "sl", "so", "sq", "sr", "ss", "su", "sv", "sw", "ta", "th", "tl", "tn", "tr",
    "uk", "ur", "uz", "vi", "wo", "xh", "yi", "yo", "zh", "zu",
)  # fmt: skip
WMT_21: tuple[str, ...] = (
    "en", "ha", "is", "ja", "cs", "ru", "zh", "de",
)  # fmt: skip

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


def has_words(family: str, codes: Sequence[str], role: str, said: str) -> bool:
    """Whether a base can be told that language, as it is said; of one with codes of its own, `codes`, as a row says it.
    role: `source_lang` or `target_lang`."""
    if family == "marian":
        return role == "source_lang" or said in codes  # the source's is not told
    if FAMILIES[family].language_tokens:
        return said in codes
    return said in NAMES or len(said) >= 4


def all_have_words(family: str, codes: Sequence[str], role: str, said: Iterable[str] | None) -> bool:
    """The same of all that a column says; None: of too many to be languages."""
    return said is not None and all(has_words(family, codes, role, each) for each in said)


def known(family: str) -> str:
    """Which languages such a base can be told, for a user."""
    if family == "marian" or FAMILIES[family].language_tokens:
        return "This base model knows the languages that GET /v1/base_models/{id} lists, by those codes."
    return "Codes of ISO 639-1 are, and names in English."


def code(said: str, codes: Sequence[str]) -> str | None:
    """Of codes such as `en_XX` or `eng_Latn` the one that was said, by itself or, where that is one alone, by its
    beginning; None: it is not among them."""
    if said in codes:
        return said
    meant = [code for code in codes if code.startswith(f"{said}_")]
    return meant[0] if len(meant) == 1 else None
