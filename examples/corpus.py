"""The documents that the tiny base is pretrained on, and the rows of the example tasks.

A document is ``[instruction NEWLINE] text NEWLINE "Answer:" answer``. Each text can be continued
in several ways, and only the instruction says which: a ward note names one condition that brought
the patient in, one that runs in the family and one that was ruled out, each of another class, so
*the same label words answer three different questions*. Without an instruction the question is
drawn at random. That is what makes prompts matter: scoring the label words with no prompt is a
guess, and a prompt (written or trained) has to say which question is meant.

A row's *content* (which conditions in which roles, which program) decides by a hash to which split
it belongs, so nothing that a validation row asks has been seen in pretraining or in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from examples import programs

CUE = "\nAnswer:"
SPLITS = ("pretrain", "train", "valid", "shifted")
HOME, SHIFTED = "home", "shifted"


@dataclass(frozen=True)
class Document:
    """One pretraining document; ``question`` names the kind of answer (for the checks)."""

    task: str
    question: str
    instruction: str
    text: str
    answer: str

    @property
    def input(self) -> str:
        """Everything before the answer."""
        return (self.instruction + "\n" if self.instruction else "") + self.text + CUE


@dataclass(frozen=True)
class Role:
    """A place that an entity takes in a scene, and the phrases by which instructions mean it."""

    heading: str  # what the role is called in an overview
    phrases: tuple[str, ...]
    frames: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Scene:
    """A family of short texts in which every role is taken by an entity of another class."""

    task: str
    classes: dict[str, tuple[str, ...]]
    roles: dict[str, Role]
    fillers: dict[str, tuple[str, ...]]
    ask_class: tuple[str, ...]
    ask_name: tuple[str, ...]
    ask_all: tuple[str, ...]
    wanted: str  # the role that the example task asks about


TRIAGE = Scene(
    task="triage",
    classes={
        "metabolic": (
            "diabetes",
            "gout",
            "hypothyroidism",
            "obesity",
            "porphyria",
            "ketoacidosis",
            "rickets",
            "scurvy",
            "hypoglycemia",
            "acidosis",
            "galactosemia",
            "hemochromatosis",
        ),
        "cardiac": (
            "angina",
            "fibrillation",
            "pericarditis",
            "endocarditis",
            "cardiomyopathy",
            "tachycardia",
            "bradycardia",
            "myocarditis",
            "arrhythmia",
            "infarction",
            "stenosis",
            "palpitations",
        ),
        "other": (
            "asthma",
            "pneumonia",
            "migraine",
            "eczema",
            "sinusitis",
            "appendicitis",
            "epilepsy",
            "sciatica",
            "tonsillitis",
            "glaucoma",
            "bronchitis",
            "psoriasis",
        ),
    },
    roles={
        "present": Role(
            heading="now",
            phrases=(
                "the reason for admission",
                "the present illness",
                "the presenting complaint",
                "what the patient came in with",
                "the current condition",
                "what the patient is treated for",
                "the illness that the patient has now",
                "the reason for the visit",
            ),
            frames={
                HOME: (
                    "{who} was admitted with {e}",
                    "{who} came in with {e}",
                    "{who} presents with {e}",
                    "{who} is treated for {e}",
                    "{who} complains of {e}",
                ),
                SHIFTED: (
                    "{who} has {e}",
                    "please come, {who} suffers from {e}",
                    "emergency, this is {e}",
                    "help is needed for {e}",
                ),
            },
        ),
        "family": Role(
            heading="family",
            phrases=(
                "the family history",
                "the illness of the relatives",
                "the disease in the family",
                "what the father or mother had",
                "the inherited condition",
                "the condition of a brother or sister",
                "the illness that runs in the family",
            ),
            frames={
                HOME: (
                    "the father had {e}",
                    "the mother had {e}",
                    "family history of {e}",
                    "a brother had {e}",
                    "relatives had {e}",
                ),
                SHIFTED: (
                    "caller says the father had {e}",
                    "my mother had {e}",
                    "our family has {e}",
                    "caller mentions a sister with {e}",
                ),
            },
        ),
        "excluded": Role(
            heading="not",
            phrases=(
                "the condition that was ruled out",
                "the diagnosis that tests excluded",
                "the disease with no sign",
                "the negative finding",
                "what the patient does not have",
                "the illness that was not found",
                "the rejected diagnosis",
            ),
            frames={
                HOME: (
                    "tests ruled out {e}",
                    "there is no {e}",
                    "the scan excluded {e}",
                    "negative for {e}",
                    "no sign of {e}",
                ),
                SHIFTED: (
                    "caller says it is not {e}",
                    "a doctor ruled out {e}",
                    "it cannot be {e}",
                    "there is no {e}",
                ),
            },
        ),
    },
    fillers={
        HOME: (
            "sleeping well",
            "lives alone",
            "blood pressure is stable",
            "does not smoke",
            "eats little",
            "walks with a stick",
            "works at night",
            "was calm on the round",
            "temperature is normal",
            "takes no other medicine",
        ),
        SHIFTED: (
            "the line is bad",
            "second floor, left door",
            "caller is upset",
            "the street is closed",
            "a dog is in the flat",
            "please stay on the line",
        ),
    },
    ask_class=(
        "Classify {np} as metabolic, cardiac or other.",
        "Is {np} metabolic, cardiac or other?",
        "Give the category of {np}.",
        "Which group does {np} belong to?",
        "Decide the class of {np}.",
        "Sort the note by {np}.",
        "Label {np} with its group.",
        "State the medical field of {np}.",
        "Choose the right class for {np}: metabolic, cardiac or other.",
    ),
    ask_name=(
        "Name {np}.",
        "Write out {np}.",
        "Copy the words for {np}.",
        "What exactly is {np}?",
        "Quote {np} from the text.",
    ),
    ask_all=(
        "Make a table of the note.",
        "List all conditions with their groups.",
        "Give an overview of the classes.",
        "Fill in the form: now, family, not.",
    ),
    wanted="present",
)

ANIMALS = Scene(
    task="animals",
    classes={
        "plants": (
            "zebra",
            "giraffe",
            "elephant",
            "deer",
            "rabbit",
            "goat",
            "bison",
            "gazelle",
            "koala",
            "tortoise",
            "camel",
            "beaver",
        ),
        "meat": (
            "lion",
            "tiger",
            "wolf",
            "hawk",
            "crocodile",
            "leopard",
            "owl",
            "hyena",
            "python",
            "lynx",
            "falcon",
            "jackal",
        ),
        "insects": (
            "anteater",
            "swift",
            "bat",
            "aardvark",
            "gecko",
            "swallow",
            "frog",
            "chameleon",
            "pangolin",
            "shrew",
            "woodpecker",
            "nightjar",
        ),
    },
    roles={
        "seen": Role(
            heading="seen",
            phrases=(
                "the animal that was seen",
                "the animal that people watched",
                "the animal in view",
                "the observed animal",
                "the visible animal",
                "the animal they looked at",
                "the spotted animal",
            ),
            frames={
                HOME: (
                    "we watched {a}",
                    "by the river we saw {a}",
                    "on the hill we spotted {a}",
                    "our guide pointed at {a}",
                    "through the glasses we observed {a}",
                ),
                SHIFTED: (
                    "visitors watched {a}",
                    "the school class looked at {a}",
                    "children took pictures of {a}",
                    "behind the glass people saw {a}",
                ),
            },
        ),
        "heard": Role(
            heading="heard",
            phrases=(
                "the animal that was heard",
                "the animal that called",
                "the source of the noise",
                "the animal they listened to",
                "the audible animal",
                "the voice from afar",
            ),
            frames={
                HOME: (
                    "at night we heard {a}",
                    "we listened to {a}",
                    "from the trees came the call of {a}",
                    "the noise was made by {a}",
                ),
                SHIFTED: (
                    "over the wall one heard {a}",
                    "from the next house came the call of {a}",
                    "the noise was made by {a}",
                    "visitors listened to {a}",
                ),
            },
        ),
        "traces": Role(
            heading="traces",
            phrases=(
                "the animal that left traces",
                "the animal of the tracks",
                "the owner of the prints",
                "the animal that left droppings",
                "the animal known by its marks",
                "the animal that had passed earlier",
            ),
            frames={
                HOME: (
                    "the path had tracks of {a}",
                    "the mud showed prints of {a}",
                    "we found droppings of {a}",
                    "the bark had marks of {a}",
                ),
                SHIFTED: (
                    "the sand showed prints of {a}",
                    "the cleaner found droppings of {a}",
                    "the gate had marks of {a}",
                    "the empty pen had tracks of {a}",
                ),
            },
        ),
    },
    fillers={
        HOME: (
            "the wind was cold",
            "the sun rose late",
            "our camp was dry",
            "clouds came from the west",
            "the grass was high",
            "the river was low",
            "we walked for an hour",
            "nobody spoke",
        ),
        SHIFTED: (
            "tickets were sold out",
            "the keeper was late",
            "it was feeding time soon",
            "the cafe was full",
            "a new fence was built",
            "the map was wrong",
        ),
    },
    ask_class=(
        "What does {np} eat?",
        "Give the diet of {np}.",
        "Say what {np} feeds on.",
        "Does {np} eat plants, meat or insects?",
        "State the food of {np}.",
        "Which food is right for {np}?",
        "Plants, meat or insects: choose for {np}.",
        "What would one feed to {np}?",
        "Decide the food group for {np}.",
    ),
    ask_name=(
        "Name {np}.",
        "Write out {np}.",
        "Which species is {np}?",
        "What exactly is {np}?",
        "Tell the name of {np}.",
    ),
    ask_all=(
        "Make a table of the diets.",
        "List all animals with their food.",
        "Give an overview of the diets.",
        "Fill in the form: seen, heard, traces.",
    ),
    wanted="seen",
)

SCENES = {scene.task: scene for scene in (TRIAGE, ANIMALS)}
PEOPLE = {
    HOME: ("a man of {n}", "a woman of {n}", "the patient", "Mr Brown", "Ms Reed"),
    SHIFTED: ("my husband", "a neighbour", "a man of {n}", "a woman of {n}", "a colleague"),
}
VAGUE = (
    "Read the following.",
    "Consider this text.",
    "Here is a text.",
    "Look at this.",
    "Answer.",
    "Give the answer.",
    "Read carefully and answer.",
    "Please reply.",
)


def split_of(content: str) -> str:
    """The split that a piece of content belongs to: 80% pretrain, 10% train, 5% and 5%."""
    bucket = zlib.crc32(content.encode()) % 20
    if bucket < 16:
        return "pretrain"
    return ("train", "train", "valid", "shifted")[bucket - 16]


def common(rng: random.Random, items: Sequence[str]) -> str:
    """Draw an item, earlier ones more often, as words are in any language.

    Frequent pairs of instruction and clause are learned first, and the rest attach to them.
    """
    return rng.choices(items, [1 / (rank + 1) for rank in range(len(items))])[0]


def sentence(words: str) -> str:
    """Capitalise and end a clause."""
    return words[0].upper() + words[1:] + "."


def scene_text(rng: random.Random, scene: Scene, entities: dict[str, str], context: str) -> str:
    """Write one text of a scene: a clause per role and perhaps a filler, in any order."""
    who = rng.choice(PEOPLE[context]).format(n=rng.randint(20, 89))
    clauses = []
    for role, entity in entities.items():
        article = "an" if entity[0] in "aeiou" else "a"
        frame = common(rng, scene.roles[role].frames[context])
        clauses.append(frame.format(e=entity, a=f"{article} {entity}", who=who))
    clauses += rng.sample(scene.fillers[context], rng.choice((0, 0, 1)))
    rng.shuffle(clauses)
    return " ".join(sentence(clause) for clause in clauses)


def scene_content(
    rng: random.Random, scene: Scene, split: str, wanted_label: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Draw the entity and the label of every role; all labels differ.

    Distinct labels keep the score without a prompt at chance, whatever question it answers.
    """
    while True:
        labels = rng.sample(sorted(scene.classes), len(scene.roles))
        label_of = dict(zip(scene.roles, labels, strict=True))
        if wanted_label is not None and label_of[scene.wanted] != wanted_label:
            continue
        entities = {role: rng.choice(scene.classes[label]) for role, label in label_of.items()}
        if split_of(scene.task + "|" + "|".join(entities.values())) == split:
            return entities, label_of


def scene_document(rng: random.Random, scene: Scene) -> Document:
    """A pretraining document of a scene, with the question named or left open.

    Some texts leave roles out: a text with a single condition teaches its class directly, which
    the model needs before it can learn to choose among three.
    """
    context = HOME if rng.random() < 0.7 else SHIFTED
    entities, label_of = scene_content(rng, scene, "pretrain")
    kept = rng.sample(sorted(entities), rng.choices((1, 2, 3), (3, 2, 5))[0])
    entities = {role: entity for role, entity in entities.items() if role in kept}
    text = scene_text(rng, scene, entities, context)
    role = rng.choice(kept)
    form = rng.choices(("class", "name", "overview"), (40, 15, 45))[0]
    if form == "overview":
        instruction = rng.choice(scene.ask_all)
        order = rng.sample(sorted(entities), len(entities))
        parts = (f"{scene.roles[r].heading}: {entities[r]}, {label_of[r]}" for r in order)
        answer = "; ".join(parts)
    else:
        asks = scene.ask_class if form == "class" else scene.ask_name
        instruction = common(rng, asks).format(np=common(rng, scene.roles[role].phrases))
        answer = label_of[role] if form == "class" else entities[role]
    return _blur(rng, Document(scene.task, f"{role}.{form}", instruction, text, answer))


def code_document(rng: random.Random) -> Document:
    """A pretraining document that says a small program in words and then in another form."""
    story = rng.random() < 0.3
    program = _program(rng, "pretrain", numeric=story)
    text = programs.story(rng, program) if story else programs.describe(rng, program)
    form = rng.choice(sorted(programs.FORMS))
    instruction = rng.choice(programs.FORMS[form].instructions)
    document = _blur(rng, Document("codegen", form, instruction, text, ""))
    if document.question == "open":  # with nothing asked, people mostly just say it again
        form = rng.choices(("words", "javascript", "lisp", "def"), (6, 2, 1, 1))[0]
    answer = programs.FORMS[form].render(program)
    return Document("codegen", document.question, document.instruction, text, answer)


def _blur(rng: random.Random, document: Document) -> Document:
    """Sometimes lose the instruction, or words of it, as people do."""
    draw = rng.random()
    instruction, question = document.instruction, document.question
    if draw < 0.10:
        instruction, question = "", "open"
    elif draw < 0.15:
        instruction, question = rng.choice(VAGUE), "open"
    elif draw < 0.40:
        words = instruction.split(" ")
        instruction = " ".join(word for word in words if rng.random() > 0.12) or words[-1]
    return Document(document.task, question, instruction, document.text, document.answer)


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of pretraining documents."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.36:
            yield scene_document(rng, TRIAGE)
        elif draw < 0.72:
            yield scene_document(rng, ANIMALS)
        else:
            yield code_document(rng)


def _program(rng: random.Random, split: str, numeric: bool = False) -> programs.Program:
    while True:
        program = programs.draw(rng, numeric=numeric)
        if split_of(programs.FORMS["def"].render(program)) == split:
            return program


def scene_rows(scene: Scene, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a scene's task: labels in equal shares, no text twice."""
    rng = random.Random(f"{scene.task}.{split}.{seed}")
    context = SHIFTED if split == "shifted" else HOME
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = sorted(scene.classes)[len(rows) % len(scene.classes)]
        entities, _ = scene_content(rng, scene, split, wanted_label=label)
        rows.setdefault(scene_text(rng, scene, entities, context), label)
    shuffled = [{"text": text, "label": label} for text, label in rows.items()]
    rng.shuffle(shuffled)
    return shuffled


def code_rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the code task; ``tests`` are calls that the written function must get right."""
    rng = random.Random(f"codegen.{split}.{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        program = _program(rng, split, numeric=split == "shifted")
        write = programs.story if split == "shifted" else programs.describe
        text = write(rng, program)
        code = programs.FORMS["def"].render(program)
        rows.setdefault(text, {"text": text, "code": code, "tests": programs.tests(program)})
    return list(rows.values())


def task_rows(task: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one data file."""
    if task == "codegen":
        return code_rows(split, count, seed)
    return scene_rows(SCENES[task], split, count, seed)
