"""What is said aloud: questions about scenes and beeps, digits, letters, numbers, short phrases, and strings of words.

A saying has two forms: the text that a synthesizer reads, with its signs, and the words that are heard.
"""

import random
import re
from dataclasses import dataclass

from .questions import Question, questions
from .scene import sample_scene, stream
from .sounds import SOUND_WORDINGS, ask_about_sounds
from .vocabulary import ATTRIBUTES, HELD_OUT_PAIRS, NUMBERS, PLACES

SAYING_WEIGHTS = {
    "question": 0.5,
    "sound": 0.05,
    "words": 0.25,
    "phrase": 0.08,
    "digits": 0.06,
    "letters": 0.03,
    "number": 0.03,
}
"""How often each kind of saying is drawn."""

PER_SCENE = 8
"""The questions among this many sayings in a row ask about the same scene."""


@dataclass(frozen=True, slots=True)
class Saying:
    """Something to say.

    Attributes:
        kind: a key of `SAYING_WEIGHTS`.
        text: what a synthesizer reads.
        heard: the same in small letters, words apart, without signs.
        asks: the number of the scene that it asks about, and the question; None if it is about none.
    """

    kind: str
    text: str
    heard: str
    asks: tuple[int, Question] | None = None


def heard(text: str) -> str:
    """The words of a text as transcripts have them: small letters and apostrophes, one space between words."""
    return " ".join(re.findall(r"[a-z']+", text.lower().replace("colour", "color")))


def sample_saying(seed: int, split: str = "train") -> Saying:
    """The saying of this number. The same seed and split give the same in every process."""
    rng = stream("saying", split, seed)
    kind = rng.choices(list(SAYING_WEIGHTS), list(SAYING_WEIGHTS.values()))[0]
    if kind == "question":
        number, place = divmod(seed, PER_SCENE)
        scene = sample_scene(number, split)
        asked = questions(scene, number, PER_SCENE) or questions(scene, number)
        question = asked[place % len(asked)]
        text = question.text.lower() if question.text.isupper() else question.text
        return Saying(kind, text, heard(text), (number, question))
    text = _TEXTS[kind](rng)
    text = text.lower() if kind == "sound" and text.isupper() else text
    return Saying(kind, text, heard(text))


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def _phrase(rng: random.Random) -> str:
    text = re.sub(r"\{(\w+)\}", lambda gap: rng.choice(_GAPS[gap[1]]), rng.choice(PHRASES))
    named = set(text.split())
    return _phrase(rng) if any(named.issuperset(pair) for pair in HELD_OUT_PAIRS) else text


def _digits(rng: random.Random) -> str:
    return rng.choice((" ", ", ")).join(rng.choices(NUMBERS, k=rng.randint(1, 6)))


def _letters(rng: random.Random) -> str:
    return ", ".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 5))) + "."


def _number(rng: random.Random) -> str:
    below_hundred = [*NUMBERS, *TEENS, *(f"{ten} {one}" for ten in TENS for one in NUMBERS[1:]), *TENS]
    hundreds = f"{rng.choice(NUMBERS[1:])} hundred"
    return rng.choice((rng.choice(below_hundred), hundreds, f"{hundreds} and {rng.choice(below_hundred[1:])}"))


def _about_sounds(rng: random.Random) -> str:
    return ask_about_sounds(rng.choice(list(SOUND_WORDINGS)), rng)


_TEXTS = {
    "sound": _about_sounds,
    "words": _words,
    "phrase": _phrase,
    "digits": _digits,
    "letters": _letters,
    "number": _number,
}

TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

PHRASES = (
    "please {do} the {thing}",
    "{do} the {thing}, please",
    "can you {do} the {thing}",
    "i would like to {do} the {thing}",
    "thank you",
    "thank you very much",
    "good {time}",
    "yes",
    "no",
    "yes, please",
    "no, thank you",
    "one moment, please",
    "where is the {thing}",
    "the {thing} is {like}",
    "the {thing} is not {like}",
    "this is a {like} {thing}",
    "there is a {like} {thing} at the {place}",
    "{do} the {like} {thing}",
    "what is the {thing} of the {thing}",
    "do you have a {like} {thing}",
    "press {digit} to {do} the {thing}",
    "press {digit}",
    "for the {thing}, press {digit}",
    "you have {digit} new {thing}s",
    "turn {side}",
    "go {side}",
    "it is {like} this {time}",
    "a {color} {shape}",
    "the {color} {shape} at the {place}",
    "we will see you in the {time}",
    "is it {like} or {like}",
    "please enter your {thing} followed by the {thing}",
    "your {thing} has been {done}",
    "sorry, that {thing} was not {done}",
)
_GAPS: dict[str, tuple[str, ...]] = {
    "do": (
        *("open", "close", "take", "find", "show", "send", "stop", "start", "play", "read", "write", "hold"),
        *("check", "call", "move", "turn", "leave", "keep"),
    ),
    "done": (
        *("opened", "closed", "taken", "found", "sent", "stopped", "started", "saved", "changed", "received"),
        *("removed", "added"),
    ),
    "thing": (
        *("door", "window", "table", "book", "letter", "number", "message", "picture", "light", "house"),
        *("car", "phone", "name", "word", "key", "paper", "list", "file", "page", "bag", "cup", "sound"),
        *("call", "code", "line", "room", "street", "time", "question", "answer", "account", "password"),
    ),
    "like": (
        *("new", "old", "big", "small", "long", "short", "good", "bad", "hot", "cold", "open", "closed"),
        *("light", "dark", "full", "empty", "early", "late"),
    ),
    "time": ("morning", "evening", "afternoon", "night"),
    "side": ("left", "right", "back", "up", "down", "around", "on"),
    "digit": NUMBERS,
    "place": PLACES,
    "color": ATTRIBUTES["color"],
    "shape": ATTRIBUTES["shape"],
}

_COMMON = """
a able about above accept across act add after again age ago agree air all almost alone along already also always am
among an and angry animal another answer any apple are area arm army around arrive art as ask at away baby back bad bag
ball bank base bear beat beautiful because become bed been before began begin behind believe bell below best better
between big bird bit black blood blow blue board boat body bone book born both bottle bottom box boy branch bread break
bridge bright bring broken brother brown build burn business busy but by call came camp can car card care carry case cat
catch cause center central certain chair chance change check chicken child choose church circle city class clean clear
climb clock close cloth cloud coat coffee cold collect color come common company compare complete computer connect
contain continue control cook cool copy corner correct cost could count country course cover cow cream create cross
crowd cry cup current cut dance danger dark date daughter day dead deal decide deep degree desert design desk did die
differ dinner direct direction discuss dish distance divide do doctor does dog dollar done door double doubt down draw
dream dress drink drive drop dry during each ear early earth east easy eat edge education effect egg eight either
electric else empty end enemy energy engine enjoy enough enter entire equal error escape even evening event ever every
exact example except excite exercise expect experience explain express extra eye face fact fail fair fall family famous
far farm fast fat father favor fear feel feet fell felt few field fight figure fill final find fine finger finish fire
first fish fit five flat floor flow flower fly follow food foot force foreign forest forget form forward found four free
fresh friend from front fruit full fun game garden gas gate gave general gentle get gift girl give glad glass go goes
gold gone good government grass gray great green ground group grow guess guest guide gun had hair half hall hand happen
happy hard has hat hate have he head hear heart heat heavy held help her high hill him his history hit hold holiday home
honest hope horse hospital hot hotel house how huge human hundred hungry hunt hurry hurt husband i ice idea if imagine
important in inch include increase industry inside instead interest into iron is island it its job join journey jump
just keep kept key kill kind king kitchen knee knife lady lake land language large last late laugh law lay lead learn
least leave led left leg length less lesson let letter level lie life lift light like line lion list listen little live
local lock long look lose loss lost lot loud love low luck lunch machine made magic main make man many map mark market
master match material matter may me meal mean measure meet member men mention message metal method middle might mile
milk million mind minute miss mistake mix modern moment money month moon more morning most mother motion mountain mouse
mouth move movie much music must my name narrow nation natural nature near nearly neck need neighbor never new news next
nice night nine no noise none nor north nose not note nothing notice now number object ocean of off offer office often
oil old on once one only open operate opinion opposite or orange order other out outside over own page pain paint paper
parent park part party pass past path pay pen people perfect perhaps person phone phrase picture piece pink place plain
plan plant plate play please point police poor position possible pound power practice prepare present president press
pretty price print prison private problem process produce program promise proper protect proud prove public pull pure
purple push put question quick quiet quite race radio rain raise ran reach ready real reason receive record red refuse
region remember repeat reply report rest result return rich ride right ring rise river road rock roll roof room root
rope rose round row rule run sad safe said salt same sand sat save say scale school science score search season seat
second secret section see seed seem sell send sense sentence separate serious serve service set settle seven several
shade shall shape share sharp she sheep sheet shell shine ship shirt shoe shoot shop shore short should shoulder shout
show shut sick side sight sign silence silver similar simple since sing single sister sit six size skin sky sleep slow
small smell smile smoke smooth snow so soap social soft soil soldier solid some song soon sorry sort sound soup south
space speak special speech speed spell spend spoke spot spread spring square stairs stand star start state station stay
step stick still stone stood stop store storm story straight strange stream street strong student study subject such
sudden sugar suggest summer sun supply support sure surface surprise sweet swim symbol system table take talk tall taste
tea teach team tear tell ten term test than thank that the them then there these they thick thin thing think third this
those though thought thousand three through throw thus ticket tie time tiny tire today together told tone took tool
tooth top total touch toward town track trade train travel tree triangle trip trouble truck true trust try tube turn
twelve twenty two type uncle under understand unit until up upon us use usual valley value very view village visit voice
wait walk wall want war warm was wash watch water wave way we weather week welcome well went were west wet what wheel
when where which while white who whole whose why wide wife wild will win wind window wine winter wire wish with without
woman women wonder word work world worry worth wrong yard year yellow yes yesterday yet you young your zero
"""

WORDS = tuple(_COMMON.split())
"""Common English words; of words that sound alike, only one."""
