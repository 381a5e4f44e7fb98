"""Words and phrases that the rules look for, in lower case."""

from __future__ import annotations

import re


def listed(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def any_of(*phrases: str) -> re.Pattern[str]:
    """Match one of the phrases as whole words, in any case."""
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.IGNORECASE)


#: Words without content.
STOP_WORDS = listed(
    "a about all also an and any are as at be been but by can could do does for from had has "
    "have he her his how i if in into is it its just may me more most my no not of on one only "
    "or other our out she should so such than that the their them then there these they this "
    "those to up us was we were what when where which while who will with would you your"
)
#: Verbs that ask for a result.
REQUESTS = listed(
    "analyse analyze assess calculate categorize classify compare compute count create decide "
    "describe detect determine discuss draft estimate evaluate explain extract find generate "
    "identify justify label list name outline predict propose provide rank rate recommend rewrite "
    "show solve state suggest summarise summarize tag tell translate write"
)
#: Those that are nouns, too: inside a sentence, a request only before one of NOUN_STARTS.
ALSO_NOUNS = listed("count draft estimate find label list name outline rank rate show state tag")
NOUN_STARTS = listed(
    "a all an any at both each every exactly how if it its me one our that the their them these "
    "this those three two us what when where whether which who why your"
)
#: What may stand before the verb of a request.
POLITE = re.compile(
    r"(?:(?:please|kindly|(?:could|can|would|will) you|i (?:would like|want|need) you to|"
    r"you (?:should|must|need to|have to)|your (?:task|job) is to|try to)\s+)+",
    re.IGNORECASE,
)
#: Verbs that say how to answer.
ANSWERS = listed(
    "answer choose end format give keep limit omit output pick print put quote reply respond "
    "return say select start use write"
)
#: "Write only the translation" says how to answer; "write a poem" is a request.
ANSWER_STARTS = listed("as at both each exactly in it no nothing one only them this your")
NEGATIVE = any_of("do not", "don['’]t", "never", "avoid", "refrain from", "must not", "should not")
#: A clause that names the thing to avoid.
UNWANTED = re.compile(
    r"(?:,?\s*(?:\b(?:and|but)\s+)?)\b(?:do not|don['’]t|never|avoid|without|refrain from)\s+"
    r"(?:mention|includ|discuss|talk|refer|say|bring up|name|list|us(?:e|ing) the words?)\w*"
    r"(?:\s+anything)?(?:\s+(?:about|to))?\s+(?!(?:it|them|this|that|anything)\b)[^.,;!?]+",
    re.IGNORECASE,
)
FORMAT = any_of(
    r"(?:answer|respond|reply|output|return)\b[^.]*",
    "in (?:one|two|three|\\d+) (?:words?|sentences?|lines?)",
    "one of",
    "(?:as|in) (?:a )?(?:json|xml|yaml|csv|table|list)",
    "format",
    "label only",
    "only the (?:label|class|name|category|word)",
)
CONSTRAINT = any_of(
    "must",
    "only",
    "exactly",
    "at most",
    "at least",
    "no more than",
    "no fewer than",
    "always",
    "never",
    "do not",
    "don['’]t",
    "avoid",
)

#: Phrases that change nothing, with what may replace them.
FILLERS = {
    r"please\s+": "",
    r",?\s*please(?=[.!?]|$)": "",
    r"kindly\s+": "",
    r"(?:could|can|would|will) you (?:please )?": "",
    r"i (?:would|'d) (?:like|love|want) (?:for )?you to\s+": "",
    r"i (?:want|need) you to\s+": "",
    r"i was wondering (?:if|whether) you (?:could|can)\s+": "",
    r"your (?:task|job) is to\s+": "",
    r"(?:make|be) sure (?:to|that you)\s+": "",
    r"it is (?:very |really )?important (?:to note )?that\s+": "",
    r"(?:please )?note that\s+": "",
    r"in order to\b": "to",
    r"due to the fact that\b": "because",
    r"as (?:much|well|best|accurately|clearly) as (?:you can|possible)": "",
    r"if (?:at all )?possible,?\s*": "",
    r"take a deep breath(?: and)?\s*": "",
    r"(?:basically|essentially|actually|literally|obviously|simply put),?\s+": "",
    r"(?:very|really|extremely|quite|rather|super)\s+(?=(?:accurate|brief|careful|clear|concise|"
    r"detailed|good|helpful|important|long|nice|precise|short|simple|useful|well))": "",
    r",?\s*if you (?:could|can),?": "",
    r"(?:maybe|perhaps)\s+": "",
    r",?\s*or something (?:like (?:that|this)|similar)": "",
    r"(?:feel free to|don['’]t hesitate to)\s+": "",
    r"thank(?:s| you)(?: (?:so much|in advance|very much))?[.!]?": "",
}
#: Amounts that every reader understands differently, with an example of a number.
VAGUE = {
    r"(?:a few|a couple of|a number of|some|several|various|numerous)(?= (?:\w+ )?\w+s\b)": "three",
    r"(?:many|a lot of|lots of|plenty of)(?= \w+)": "ten",
    r"(?<=be )(?:fairly |relatively )?(?:short|brief|concise)": "at most 20 words long",
    r"(?<=it )(?:fairly |relatively )?(?:short|brief|concise)": "to at most 20 words",
    r"(?:fairly |relatively )?(?:short|brief|concise|long)"
    r"(?= (?:answer|description|explanation|list|overview|reply|response|summary|text))": "20-word",
    r",?\s*(?:etc\.?|and so on|and so forth)(?!\w)(?:,)?": "",
}
#: Negative words with their opposites.
OPPOSITES = {
    "without": "with",
    "exclude": "include",
    "excluding": "including",
    "omit": "include",
    "omitting": "including",
    "ignore": "consider",
    "ignoring": "considering",
    "fail to": "",
    "forget to": "",
    "neglect to": "",
    "avoid": "include",
    "irrelevant": "only relevant",
    "unrelated": "only related",
    "unnecessary": "only necessary",
    "unimportant": "only important",
    "unclear": "clear",
    "uncommon": "common",
    "unlikely": "likely",
    "unhappy": "happy",
    "unhelpful": "helpful",
    "unsatisfied": "satisfied",
    "dissatisfied": "satisfied",
    "untrue": "true",
    "impossible": "possible",
    "incorrect": "only correct",
    "incomplete": "only complete",
    "inaccurate": "only accurate",
    "no": "",
    "nothing": "something",
    "none": "all",
}
#: Fashionable words with plain ones.
JARGON = {
    "utilize": "use",
    "utilise": "use",
    "leverage": "use",
    "actionable insights": "recommendations",
    "deep dive": "analysis",
    "synergies": "common effects",
    "holistic": "complete",
    "best-in-class": "best",
    "low-hanging fruit": "easiest steps",
    "stakeholders": "people concerned",
    "paradigm": "model",
    "granular": "detailed",
}
#: Abbreviations that need no definition, and words that people write in capitals for emphasis.
KNOWN = listed(
    "A AI ALL ALWAYS AM AND ANSWER ANY API ASCII BBC BE CEO CPU CSS CSV DNA DO DON'T EU EXACTLY "
    "FALSE FAQ GPS GPU HTML HTTP I ID IDS IF IMPORTANT IN INPUT IS ISO IT JSON LABEL LLM MUST "
    "NEVER NLP NO NONE NOT NOTE NULL OK ONE ONLY OR OUTPUT PC PDF PM Q QA QUESTION RNA SMS SQL "
    "TEXT THE TODO TRUE TV UK UN URL US USA USB UTC UTF VAT WARNING XML YAML YES"
)
#: Demands that exclude each other.
_OPPOSED = (
    (
        "brief(?:ly)?|short|concise(?:ly)?|one word|one sentence|single word",
        "detailed|in (?:full |great )?detail|comprehensive(?:ly)?|thorough(?:ly)?|"
        "exhaustive(?:ly)?|at length|step by step|complete (?:list|overview)",
    ),
    (
        "one word|single word|label only|only (?:with )?the (?:label|class|name|category|word)",
        "explain|justify|give (?:a |your )?reasons?|describe|elaborate",
    ),
    ("formal(?:ly)?", "informal(?:ly)?|casual(?:ly)?|friendly|slang"),
    ("(?:as|in) (?:valid )?json", "plain text|(?:as|in) (?:a )?(?:markdown|xml|yaml|csv)"),
    (
        "(?:simple|plain) (?:words|language)|for (?:a child|laypeople|beginners)",
        "technical (?:terms|language)|for experts|expert-level",
    ),
    (
        "objective(?:ly)?|neutral(?:ly)? (?:tone|style)",
        "persuasive(?:ly)?|your opinion|your personal",
    ),
)
OPPOSED = tuple((any_of(first), any_of(second)) for first, second in _OPPOSED)
