"""Words and phrases that the rules look for, in lower case."""

from __future__ import annotations

import re


def listed(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def any_of(*phrases: str) -> re.Pattern[str]:
    """Match one of the phrases as whole words, in any case."""
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.IGNORECASE)


#: What separates a phrase from the words before it, and is removed with it.
GAP = r"(?:,\s*|\s+)"


def phrase(pattern: str) -> re.Pattern[str]:
    """Match a pattern that begins with a whole word, or with what is before it, in any case."""
    start = "" if pattern.startswith(GAP) else r"(?<!\w)"
    return re.compile(start + pattern, re.IGNORECASE)


#: Words without content.
STOP_WORDS = listed(
    "a about all also an and any are as at be been but by can could do does for from had has "
    "have he her his how i if in into is it its just may me more most my no not of on one only "
    "or other our out she should so such than that the their them then there these they this "
    "those to up us was we were what when where which while who will with would you your"
)
#: Verbs that ask for a result.
REQUESTS = listed(
    "analyse analyze assess calculate categorize check classify compare compute convert correct "
    "count create decide describe detect determine discuss draft estimate evaluate explain extract "
    "find fix generate get identify justify label list name outline predict propose provide rank "
    "rate recommend rewrite show solve state suggest summarise summarize tag tell translate write"
)
#: Those that are nouns, too: inside a sentence, a request only before one of NOUN_STARTS.
ALSO_NOUNS = listed(
    "check correct count draft estimate find fix label list name outline rank rate show state tag"
)
NOUN_STARTS = listed(
    "a all an any at both each every exactly how if it its many me most one our several some that "
    "the their them these this those three two us what when where whether which who why your"
)
#: What may stand before the verb of a request.
POLITE = re.compile(
    r"(?:(?:please|kindly|(?:could|can|would|will) you|i (?:would like|want|need) you to|"
    r"you (?:should|must|need to|have to)|your (?:task|job) is to|try to)\s+)+",
    re.IGNORECASE,
)
#: "Briefly name the field": what may stand between these and the verb.
ADVERB = re.compile(r"(?!reply|apply|only)[a-z]+ly\s+", re.IGNORECASE)
#: Verbs that say how to answer.
ANSWERS = listed(
    "answer choose end format give keep limit omit output pick print put quote reply respond "
    "return say select start use write"
)
#: "Write only the translation" says how to answer; "write a poem" is a request.
ANSWER_STARTS = listed("as at both each exactly in it no nothing one only them this your")
#: "Give me a list" and "give it a title" are requests; "give the number" says how to answer.
RECEIVERS = listed("it me them us")
#: "List them" says how to present a result that another sentence asks for.
PRESENT = listed("list name show state write")
BACK = re.compile(r"(?:it|them|both|each|these|those|all of (?:it|them))\b")
#: Words that a question contains. "Yes or no?" only lists its answers.
QUESTION_WORDS = listed(
    "what which who whom whose when where why how is are was were do does did has have had can "
    "could should will would may might must"
)
NEGATIVE = any_of(
    "do not", "don['’]t", "never", "avoid", "refrain from", "must not", "mustn['’]t", "should not",
    "shouldn['’]t", "try not to",
)  # fmt: skip
#: Forbidden acts with the demand that says the same positively.
POSITIVE = {
    r"(?:change|alter|modify)\s+(.+)": r"keep \1 unchanged",
    r"exceed\s+(.+)": r"stay within \1",
    r"(?:translate|remove|delete)\s+(.+)": r"keep \1 as in the text",
    r"(?:guess|speculate|invent|make up|hallucinate)\b.*": "use only what the text says",
}
#: The case in which a demand applies: "If there is no date, write none."
CASE = re.compile(r"(?:if|when|where|unless|otherwise|in case)\b", re.IGNORECASE)
#: Parts of an answer's form. "No comments" does not bring up a subject.
FORM_NOUNS = any_of(
    "apolog(?:y|ies)", "code (?:blocks?|fences?)", "comments?", "explanations?", "formatting",
    "greetings?", "headings?", "introductions?", "markdown", "notes?", "preambles?", "punctuation",
    "prefix(?:es)?", "quotes?", "quotation marks", "reasoning", "(?:other|additional|extra) text",
    "titles?",
)  # fmt: skip
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
#: A sentence that demands something without beginning with a verb; others may state facts.
DEMAND = any_of(
    "must", "should", "need to", "ha(?:s|ve) to", NEGATIVE.pattern, "(?:your|the) answer"
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

_VERB = rf"(?:{'|'.join(sorted(REQUESTS | ANSWERS))})\b"
_THANKS = (
    r"(?:many )?thank(?:s| you)(?: (?:so much|very much|a lot))?(?: in advance)?(?: for your help)?"
    r"(?! *\w)[.!]?"
)
#: Phrases that change nothing, with what may replace them.
FILLERS = {
    r"please\s+": "",
    rf"{GAP}please(?=[.!?]|$)": "",
    r"kindly\s+": "",
    rf"(?:^|(?<=\n)|(?<=[,.!?;:] ))(?:(?:could|can|will) you (?:please )?|"
    rf"would you (?:please|kindly) )(?:help me )?(?={_VERB})": "",
    r"(?:it would be|it['’]d be) (?:great|good|nice|helpful) if you (?:could|can|would)\s+": "",
    r"i(?: would|['’]d) (?:really )?appreciate it if you (?:could|can|would)\s+": "",
    r"i(?: would|['’]d) (?:like|love|want) (?:for )?you to\s+": "",
    r"i (?:want|need) you to\s+": "",
    r"i was wondering (?:if|whether) you (?:could|can)\s+": "",
    r"your (?:task|job) is to\s+": "",
    r"(?:make|be) sure (?:to|that you)\s+": "",
    r"it is (?:very |really )?important (?:to note )?that\s+": "",
    r"(?:please )?note that\s+": "",
    r"in order to\b": "to",
    r"due to the fact that\b": "because",
    r"as (?:much|well|best|accurately|clearly) as (?:you can|possible)": "",
    rf"{GAP}if (?:at all )?possible(?:,\s*|(?=[.!?]|$))": " ",
    r"if (?:at all )?possible,?\s*": "",
    r"take a deep breath(?: and)?\s*": "",
    r"(?:basically|essentially|actually|obviously|simply put),?\s+": "",
    r"(?:very|really|extremely|quite|rather|super)\s+(?=(?:accurate|brief|careful|clear|concise|"
    r"detailed|good|helpful|important|long|nice|precise|short|simple|useful|well))": "",
    rf"{GAP}if you (?:could|can)(?:,|(?=[.!?]|$))": "",
    r"(?:maybe|perhaps)\s+": "",
    rf"{GAP}or something (?:like (?:that|this)|similar)": "",
    r"(?:feel free to|don['’]t hesitate to)\s+": "",
    rf"{GAP}{_THANKS}": "",
    _THANKS: "",
}
#: Amounts that every reader understands differently, with an example of a number.
VAGUE = {
    r"(?:a few|a couple of|a number of|some|several|various|numerous)(?= (?:\w+ )?\w+s\b)": "three",
    r"(?<!how )(?<!as )(?<!too )(?:many|a lot of|lots of|plenty of|a bunch of)(?= \w+)": "ten",
    rf"{GAP}not too (?:long|short)(?=[,.;]|$)": " in at most 20 words",
    r"(?<=be )(?:fairly |relatively )?(?:short|brief|concise)": "at most 20 words long",
    r"(?<=it )(?:fairly |relatively )?(?:short|brief|concise)": "to at most 20 words",
    r"(?<!the )(?<!this )(?<!each )(?:fairly |relatively )?(?:short|brief|concise|long)"
    r"(?= (?:answer|description|explanation|list|overview|reply|response|summary|text))": "20-word",
    rf"{GAP}(?:etc\.?|and so on|and so forth)(?!\w),?": "",
}
#: A negation does not reach behind one of these.
NEXT_CLAUSE = any_of("and", "because", "but", "if", "or", "that", "unless", "when", "which", "who")
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
    "A AI AIDS ALL ALWAYS AM AND ANSWER ANY API ASCII ATM BBC BE CD CEO CIA COVID COVID-19 CPU "
    "CSS CSV DNA DO DON'T DVD EU EUR EXACTLY FALSE FAQ FBI GBP GIF GPS GPU HIV HTML HTTP HTTPS "
    "I ID IDS IF IMPORTANT IN INPUT IP IQ IS ISO IT JPEG JSON LABEL LED LLM MAYBE MB MUST NASA "
    "NATO NEVER NLP NO NONE NOT NOTE NULL OK ONE ONLY OR OUTPUT PC PDF PIN PM PNG Q QA QUESTION "
    "RNA SMS SQL TEXT THE TODO TRUE TV UK UN URL US USA USB USD UTC UTF VAT WARNING WWW XML "
    "YAML YES iOS"
)
#: Demands that exclude each other.
_OPPOSED = (
    (
        "brief(?:ly)?|short|concise(?:ly)?|one word|one sentence|single word|"
        "(?:under|within|up to|at most|no more than|(?:fewer|less) than) "
        "(?:1?\\d|20|two|three|four|five|six|seven|eight|nine|ten|fifteen|twenty) words",
        "detailed|in (?:full |great )?detail|comprehensive(?:ly)?|thorough(?:ly)?|"
        "exhaustive(?:ly)?|at length|step[- ]by[- ]step|complete (?:list|overview)",
    ),
    (
        "one word|single word|label only|only (?:with )?the (?:label|class|name|category|word)",
        "explain (?:your|why|how|in detail)|justify|give (?:a |your )?reasons?|elaborate",
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
