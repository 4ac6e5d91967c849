"""The built-in questions: everyday knowledge as multiple choice, in the LLM-Adapters row format.

The tables below hold a few hundred facts, one relation each. A fact becomes one question; its wrong choices are the
answers of other facts of the same relation, so that only knowing the fact helps, not the style of the words.

No leakage: *subjects* are split, over all relations at once, before any question is made. Whoever is asked about in a
test question (the dog) is the subject of no training question, whatever its wording or relation, and wrong choices
come from facts of the same split. The right answer stands equally often in every position.

Rows look like those of the task ``arc_easy`` and are filed under that name so that they are read like any other local
data; they are not that data set, and scores on them say nothing about it. Answers are single words and the choices are
named by them (``Answer format: kitten/puppy/calf``), which a model of 135M parameters learns to use within a few dozen
steps.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from adalora_dist.tasks.rows.demo_folder import demo_folder, write_rows

Split = Literal["train", "test"]

TASK = "arc_easy"
LEAD = "Please choose the correct answer to the question:"
NUM_CHOICES = 3
TEST_SHARE = 0.18
"""Share of the subjects that is held out; about 75 questions, which a small CPU evaluates in half a minute."""
SEED = 6


class Row(TypedDict):
    """One row of the LLM-Adapters format."""

    instruction: str
    input: str
    output: str
    answer: str


class Fact(NamedTuple):
    """``answer`` is what ``relation`` asks about ``subject``; ``entity`` is the subject without its article."""

    relation: str
    subject: str
    answer: str

    @property
    def entity(self) -> str:
        return re.sub(r"^(a|an|the) ", "", self.subject)


# Question, and facts as "subject: answer". Within a table, the answer to one subject is wrong for every subject that
# has another answer.
RELATIONS: dict[str, tuple[str, str]] = {
    "young": ("What is {}'s young called?", """
        a dog: puppy; a cat: kitten; a cow: calf; a sheep: lamb; a horse: foal; a pig: piglet; a hen: chick;
        a duck: duckling; a goose: gosling; a swan: cygnet; a bear: cub; a deer: fawn; a goat: kid; a kangaroo: joey;
        a frog: tadpole; a butterfly: caterpillar; an owl: owlet; an eagle: eaglet; a rabbit: bunny"""),
    "sound": ("What sound does {} make?", """
        a dog: bark; a cat: meow; a cow: moo; a sheep: bleat; a pig: oink; a duck: quack; a lion: roar; a snake: hiss;
        a bee: buzz; a wolf: howl; a horse: neigh; a rooster: crow; an owl: hoot; a frog: croak; a mouse: squeak;
        a turkey: gobble; a donkey: bray; a sparrow: chirp; a clock: tick; a telephone: ring; thunder: rumble"""),
    "home": ("Where does {} live?", """
        a bee: hive; a sparrow: nest; a shark: ocean; a spider: web; a horse: stable; a pig: sty; a rabbit: burrow;
        a lion: savanna; a camel: desert; a hen: coop; an ant: anthill; a king: palace; a bat: cave; a monkey: jungle;
        a monk: monastery; a prisoner: jail; a goldfish: bowl; a frog: pond; a penguin: Antarctica; a canary: cage;
        a soldier: barracks; an orphan: orphanage"""),
    "opposite": ("What is the opposite of {}?", """
        hot: cold; big: small; up: down; day: night; happy: sad; fast: slow; hard: soft; rich: poor; wet: dry;
        full: empty; open: closed; early: late; strong: weak; high: low; near: far; loud: quiet; clean: dirty;
        true: false; win: lose; buy: sell; push: pull; start: stop; love: hate; left: right; north: south; east: west;
        first: last; inside: outside; alive: dead; asleep: awake; give: take; arrive: leave; remember: forget;
        friend: enemy; war: peace; question: answer; deep: shallow; thick: thin; wide: narrow; rough: smooth;
        brave: cowardly; sweet: bitter; tall: short; cheap: expensive; safe: dangerous; easy: difficult; top: bottom;
        front: back; summer: winter; black: white; male: female; always: never; everything: nothing; laugh: cry;
        increase: decrease; add: subtract; multiply: divide; success: failure; polite: rude; guilty: innocent"""),
    "material": ("What is {} made of?", """
        a window: glass; a nail: iron; a sweater: wool; a book: paper; a tyre: rubber; a candle: wax; a saddle: leather;
        a wedding ring: gold; a brick: clay; a sandcastle: sand; a snowman: snow; a T-shirt: cotton; a plank: wood;
        a bread roll: flour; cheese: milk; an omelette: eggs; wine: grapes; french fries: potatoes; ketchup: tomatoes;
        cider: apples; popcorn: corn; a statue: stone; peanut butter: peanuts; guacamole: avocados; a skeleton: bones;
        a forest: trees; bacon: pork; sushi: rice; a puddle: water; a choir: singers; a novel: words"""),
    "use": ("What is {} used for?", """
        a broom: sweeping; a key: unlocking; a pen: writing; an oven: baking; a fridge: cooling; a telescope: astronomy;
        a towel: drying; a needle: sewing; a ladder: climbing; a shovel: digging; a bed: sleeping;
        a camera: photography; a ruler: measuring; a lamp: lighting; a saw: cutting; a calculator: arithmetic;
        a map: navigation; a kettle: boiling; a razor: shaving; a piano: music; a chair: sitting; a pan: frying;
        glue: sticking; soap: washing; a rope: tying; a spoon: stirring; an eraser: erasing; a rifle: shooting;
        a drum: drumming; a bicycle: riding; a recipe: cooking; a radiator: heating; a magnifying glass: enlarging;
        a microphone: recording"""),
    "worker": ("Who {}?", """
        puts out fires: firefighter; teaches children: teacher; flies planes: pilot; bakes bread: baker;
        repairs teeth: dentist; cuts hair: barber; grows crops: farmer; delivers letters: postman;
        arrests thieves: policeman; treats sick people: doctor; treats sick animals: vet; mends pipes: plumber;
        paints pictures: artist; writes novels: author; sells meat: butcher; repairs cars: mechanic;
        cooks in a restaurant: chef; takes photographs: photographer; sews suits: tailor; designs buildings: architect;
        lends out books: librarian; catches fish: fisherman; serves at table: waiter; travels into space: astronaut;
        digs for coal: miner; makes furniture: carpenter; acts in films: actor; reports the news: journalist;
        sells flowers: florist; sails a ship: sailor; defends people in court: lawyer; does magic tricks: magician;
        rules a kingdom: king; writes computer programs: programmer; fights in a war: soldier;
        makes circus jokes: clown"""),
    "colour": ("What colour is {}?", """
        grass: green; snow: white; the sky: blue; a banana: yellow; coal: black; blood: red; a carrot: orange;
        chocolate: brown; a lemon: yellow; a tomato: red; milk: white; an elephant: grey; a flamingo: pink;
        a frog: green; the sun: yellow; a strawberry: red; tar: black; spinach: green; a raven: black;
        a pumpkin: orange; lettuce: green; salt: white; mud: brown; the ocean: blue; a pig: pink; a polar bear: white;
        a canary: yellow; ketchup: red; a cucumber: green; a fire engine: red; an aubergine: purple; lavender: purple;
        coffee: brown; flour: white; ash: grey; a pea: green; cotton: white; a cherry: red"""),
    "kind": ("What kind of thing is {}?", """
        a carrot: vegetable; an onion: vegetable; a cabbage: vegetable; an apple: fruit; a pear: fruit; a mango: fruit;
        a plum: fruit; a bus: vehicle; a truck: vehicle; a bicycle: vehicle; a tractor: vehicle; a hammer: tool;
        a screwdriver: tool; a wrench: tool; a drill: tool; a shirt: clothing; a jacket: clothing; a skirt: clothing;
        a violin: instrument; a trumpet: instrument; a flute: instrument; a piano: instrument; a sofa: furniture;
        a wardrobe: furniture; a chair: furniture; a bookcase: furniture; tea: drink; lemonade: drink; coffee: drink;
        beer: drink; tennis: sport; football: sport; hockey: sport; rugby: sport; an ant: insect; a wasp: insect;
        a beetle: insect; a mosquito: insect; a salmon: fish; a trout: fish; a tuna: fish; an eagle: bird;
        a pigeon: bird; a parrot: bird; France: country; Japan: country; Brazil: country; Egypt: country; iron: metal;
        copper: metal; silver: metal; a rose: flower; a tulip: flower; a daisy: flower; an oak: tree; a pine: tree;
        a birch: tree; Paris: city; London: city; Tokyo: city; a square: shape; a triangle: shape; a circle: shape;
        red: colour; blue: colour; measles: disease; cholera: disease; July: month; October: month; Spanish: language;
        Italian: language"""),
    "place": ("Where do you go to {}?", """
        buy bread: bakery; borrow a book: library; watch a film: cinema; catch a train: station; catch a plane: airport;
        sleep: bedroom; cook dinner: kitchen; attend mass: church; save money: bank; see lions: zoo;
        have an operation: hospital; build a sandcastle: beach; take a shower: bathroom; buy medicine: pharmacy;
        see old paintings: museum; lift weights: gym; ski: mountains; plant flowers: garden; get a degree: university;
        be judged for a crime: court; board a ship: harbour; watch a football match: stadium; repair a car: garage"""),
    "organ": ("What do you {} with?", """
        see: eyes; hear: ears; smell: nose; lick: tongue; chew: teeth; think: brain; breathe: lungs; kick: foot;
        hug: arms; point: finger; kiss: lips; kneel: knees; digest food: stomach; pump blood: heart"""),
    "next": ("What comes right after {}?", """
        Monday: Tuesday; Thursday: Friday; Saturday: Sunday; January: February; March: April; June: July;
        September: October; spring: summer; autumn: winter; breakfast: lunch; morning: afternoon; lightning: thunder;
        one: two; nine: ten; twelve: thirteen; pregnancy: birth; childhood: adolescence; a wedding: honeymoon"""),
    "effect": ("What will {} do?", """
        ice in the sun: melt; water in a freezer: freeze; a glass dropped on stone: break; paper in a flame: burn;
        a plant without water: wilt; a pricked balloon: burst; iron in the rain: rust; boiling water: evaporate;
        a stone in a pond: sink; a cork in a pond: float; sugar in tea: dissolve; a seed in wet soil: sprout;
        a ball on a slope: roll; a kite in the wind: fly; old fruit: rot; a happy audience: clap; a tired child: sleep;
        a stretched spring: contract; a hungry baby: cry; a cut finger: bleed; a mirror: reflect; a magnet: attract"""),
    "capital": ("What is the capital of {}?", """
        France: Paris; Japan: Tokyo; England: London; Italy: Rome; Spain: Madrid; Germany: Berlin; Egypt: Cairo;
        Russia: Moscow; Greece: Athens; China: Beijing; Austria: Vienna; Ireland: Dublin; Portugal: Lisbon;
        Cuba: Havana; Norway: Oslo; Poland: Warsaw; Sweden: Stockholm; Kenya: Nairobi"""),
}  # fmt: skip


def all_facts() -> list[Fact]:
    """Every fact of every table, in the order of the tables."""
    facts = []
    for relation, (_, table) in RELATIONS.items():
        for entry in table.split(";"):
            subject, _, answer = " ".join(entry.split()).partition(": ")
            facts.append(Fact(relation, subject, answer))
    return facts


def facts_of(split: Split, seed: int = SEED) -> list[Fact]:
    """The facts whose subjects belong to ``split``; the two splits share no entity."""
    facts = all_facts()
    entities = sorted({fact.entity for fact in facts})
    random.Random(f"{seed} split").shuffle(entities)
    held_out = set(entities[: round(TEST_SHARE * len(entities))])
    return [fact for fact in facts if (fact.entity in held_out) == (split == "test")]


def demo_questions(split: Split, seed: int = SEED) -> list[Row]:
    """The questions of one split in random order; the same for the same seed, on every machine.

    A fact whose relation has fewer than two other answers in this split makes no question.
    """
    draw = random.Random(f"{seed} {split}")
    facts = facts_of(split, seed)
    draw.shuffle(facts)
    rows: list[Row] = []
    for fact in facts:
        others = sorted({f.answer for f in facts if f.relation == fact.relation} - {fact.answer})
        if len(others) < NUM_CHOICES - 1:
            continue
        choices = draw.sample(others, NUM_CHOICES - 1)
        choices.insert(len(rows) % NUM_CHOICES, fact.answer)
        question = RELATIONS[fact.relation][0].format(fact.subject)
        rows.append(
            {
                "instruction": f"{LEAD} {question}\n\nAnswer format: {'/'.join(choices)}",
                "input": "",
                "output": f"the correct answer is {fact.answer}",
                "answer": fact.answer,
            }
        )
    return rows


def write_demo_questions(folder: Path, seed: int = SEED) -> None:
    """Write ``folder/arc_easy/{train,test}.jsonl``, which ``load_tasks`` reads like any local source."""
    write_rows(folder, _files(seed))


def demo_questions_folder() -> Path:
    """A data folder with the built-in questions, in the user's cache."""
    return demo_folder("demo-questions", _files(SEED))


def _files(seed: int) -> dict[str, list[Row]]:
    splits: tuple[Split, ...] = ("train", "test")
    return {f"{TASK}/{split}.jsonl": demo_questions(split, seed) for split in splits}
