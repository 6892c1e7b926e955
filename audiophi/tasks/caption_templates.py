"""Captions of clips that only have a class label, by templates.

A caption always contains the label's words (maybe inflected: bark, barking), so that whether a generated caption names
the right class can be read off its words (`evaluation.caption_metrics.label_accuracy`), and never those of another
class of the same set: no crowing rooster, because ESC-50 has a crow.
"""

# With {} = a noun phrase. As Clotho's captions, they are sentences; `text_case: lower` makes words of them.
TEMPLATES = (
    "{}.",
    "The sound of {}.",
    "{} can be heard.",
    "You can hear {}.",
    "This is the sound of {}.",
    "A recording of {}.",
)

# Class name -> noun phrase, and where English has one a clause with a verb.
PHRASES: dict[str, tuple[str, ...]] = {
    # ESC-50, in the order of its targets. ESC-10 is a part of it under other names.
    "dog": ("a dog", "a dog makes a noise"),
    "rooster": ("a rooster", "a rooster is calling"),
    "pig": ("a pig", "a pig is grunting"),
    "cow": ("a cow", "a cow is mooing"),
    "frog": ("a frog", "a frog is croaking"),
    "cat": ("a cat", "a cat is meowing"),
    "hen": ("a hen", "a hen is clucking"),
    "insects": ("insects", "insects are buzzing"),
    "sheep": ("a sheep", "a sheep is bleating"),
    "crow": ("a crow", "a crow is cawing"),
    "rain": ("rain", "rain is falling"),
    "sea waves": ("sea waves", "sea waves are breaking on the shore"),
    "crackling fire": ("a crackling fire", "a fire is crackling"),
    "crickets": ("crickets", "crickets are singing"),
    "chirping birds": ("chirping birds", "birds are chirping"),
    "water drops": ("water drops", "water drops are falling"),
    "wind": ("wind", "wind is blowing"),
    "pouring water": ("pouring water", "somebody is pouring water"),
    "toilet flush": ("a toilet flush", "a toilet is flushing"),
    "thunderstorm": ("a thunderstorm", "a thunderstorm is rumbling"),
    "crying baby": ("a crying baby", "a baby is crying"),
    "sneezing": ("sneezing", "somebody is sneezing"),
    "clapping": ("clapping", "people are clapping"),
    "breathing": ("breathing", "somebody is breathing"),
    "coughing": ("coughing", "somebody is coughing"),
    "footsteps": ("footsteps", "footsteps are coming closer"),
    "laughing": ("laughing", "somebody is laughing"),
    "brushing teeth": ("brushing teeth", "somebody is brushing their teeth"),
    "snoring": ("snoring", "somebody is snoring"),
    "drinking sipping": ("drinking and sipping", "somebody is drinking and sipping"),
    "door wood knock": ("a knock on a wood door", "a knock sounds on a wood door"),
    "mouse click": ("a mouse click", "a mouse is clicking"),
    "keyboard typing": ("keyboard typing", "somebody is typing on a keyboard"),
    "door wood creaks": ("a wood door that creaks", "a wood door creaks"),
    "can opening": ("a can opening", "a can is opening"),
    "washing machine": ("a washing machine", "a washing machine is running"),
    "vacuum cleaner": ("a vacuum cleaner", "a vacuum cleaner is running"),
    "clock alarm": ("a clock alarm", "the alarm of a clock is ringing"),
    "clock tick": ("the tick of a clock", "a clock is ticking"),
    "glass breaking": ("glass breaking", "glass is breaking"),
    "helicopter": ("a helicopter", "a helicopter is flying"),
    "chainsaw": ("a chainsaw", "a chainsaw is running"),
    "siren": ("a siren", "a siren is wailing"),
    "car horn": ("a car horn", "the horn of a car is honking"),
    "engine": ("an engine", "an engine is running"),
    "train": ("a train", "a train is passing"),
    "church bells": ("church bells", "church bells are ringing"),
    "airplane": ("an airplane", "an airplane is flying"),
    "fireworks": ("fireworks", "fireworks are exploding"),
    "hand saw": ("a hand saw", "somebody is using a hand saw"),
    # ESC-10 as first released.
    "dog bark": ("a dog bark", "a dog is barking"),
    "baby cry": ("the cry of a baby", "a baby is crying"),
    "person sneeze": ("the sneeze of a person", "a person lets out a sneeze"),
    "fire crackling": ("the crackling of a fire", "a fire is crackling"),
    # UrbanSound8K.
    "air conditioner": ("an air conditioner", "an air conditioner is humming"),
    "children playing": ("children playing", "children are playing"),
    "drilling": ("drilling", "somebody is drilling"),
    "engine idling": ("an engine idling", "an engine is idling"),
    "gun shot": ("a gun shot", "a gun shot is fired"),
    "jackhammer": ("a jackhammer", "a jackhammer is pounding"),
    "street music": ("street music", "street music is playing"),
    # Instruments.
    "acoustic guitar": ("an acoustic guitar", "somebody is playing an acoustic guitar"),
    "bass drum": ("a bass drum", "somebody is playing a bass drum"),
    "cello": ("a cello", "somebody is playing a cello"),
    "clarinet": ("a clarinet", "somebody is playing a clarinet"),
    "double bass": ("a double bass", "somebody is playing a double bass"),
    "flute": ("a flute", "somebody is playing a flute"),
    "hi hat": ("a hi hat", "somebody is playing a hi hat"),
    "saxophone": ("a saxophone", "somebody is playing a saxophone"),
    "snare drum": ("a snare drum", "somebody is playing a snare drum"),
    "violin or fiddle": ("a violin or fiddle", "somebody is playing a violin or fiddle"),
}


def class_name(label: str) -> str:
    """A data set's class name as words: "Sea_waves" -> "sea waves"."""
    return " ".join(label.replace("_", " ").replace("-", " ").lower().split())


def class_captions(label: str) -> list[str]:
    """Every caption that the templates make for a class, in a fixed order. A class without an entry in PHRASES is its
    own noun phrase."""
    name = class_name(label)
    phrase, *clauses = PHRASES.get(name, (name,))
    captions = [template.format(phrase) for template in TEMPLATES]
    captions += [f"{clause}." for clause in clauses]
    return [caption[0].upper() + caption[1:] for caption in captions]


def captions_of(captions, text: str | None, label: str | None) -> list[str]:
    """A clip's captions: those given; else its text, unless that only repeats the class; else the class's templates."""
    given = [" ".join(caption.split()) for caption in captions or () if caption and caption.strip()]
    if given:
        return given
    if text and text.strip() and (not label or class_name(text) != class_name(label)):
        return [text.strip()]
    return class_captions(label) if label and label.strip() else []
