"""The built-in questions: everyday knowledge as multiple choice, in the LLM-Adapters row format.

A few hundred facts stand below as tables, one relation each. A fact becomes a question; its wrong choices are the
answers of other facts of the same relation, so that only knowing the fact (not the style of the words) helps.

No leakage: *subjects* are split, over all relations at once, before any question is made. A subject asked about in
the test questions ("dog") is the subject of no training question whatever its wording or relation, and wrong choices
come from the same split. The right answer stands equally often in every position.

The rows follow the format of two LLM-Adapters tasks and are filed under their names, ``arc_easy`` and ``winogrande``;
they are not those data sets, and scores on them say nothing about those benchmarks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "test"]

NUM_CHOICES = 3
TEST_SHARE = 0.25


class Fact(NamedTuple):
    """One line of a table: the answer to what ``relation`` asks about ``subject``."""

    relation: str
    subject: str
    answer: str


class Relation(NamedTuple):
    """A question with a place for the subject, and its facts as ``subject: answer`` separated by semicolons."""

    question: str
    table: str


RELATIONS: dict[str, Relation] = {
    "young": Relation("What is a young {} called?", """
        dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; pig: piglet; hen: chick; duck: duckling;
        goose: gosling; swan: cygnet; bear: cub; deer: fawn; goat: kid; kangaroo: joey; frog: tadpole;
        butterfly: caterpillar; owl: owlet; eagle: eaglet; rabbit: bunny; king: prince; woman: girl; man: boy"""),
    "sound": Relation("What sound does a {} make?", """
        dog: bark; cat: meow; cow: moo; sheep: bleat; pig: oink; duck: quack; lion: roar; snake: hiss; bee: buzz;
        wolf: howl; horse: neigh; rooster: crow; owl: hoot; frog: croak; mouse: squeak; turkey: gobble;
        donkey: bray; sparrow: chirp; clock: tick; telephone: ring; whip: crack"""),
    "home": Relation("Where does a {} live?", """
        bee: hive; sparrow: nest; shark: ocean; spider: web; horse: stable; pig: sty; rabbit: burrow; lion: savanna;
        camel: desert; hen: coop; ant: anthill; king: palace; bat: cave; monkey: jungle; monk: monastery;
        prisoner: jail; goldfish: bowl; frog: pond; squirrel: tree; penguin: Antarctica; vampire: coffin;
        canary: cage; soldier: barracks; student: dormitory"""),
    "opposite": Relation("What is the opposite of {}?", """
        hot: cold; big: small; up: down; day: night; happy: sad; fast: slow; hard: soft; rich: poor; wet: dry;
        full: empty; open: closed; early: late; strong: weak; high: low; near: far; loud: quiet; clean: dirty;
        true: false; win: lose; buy: sell; push: pull; start: stop; love: hate; left: right; north: south;
        east: west; first: last; inside: outside; alive: dead; asleep: awake; give: take; arrive: leave;
        remember: forget; friend: enemy; war: peace; question: answer; deep: shallow; thick: thin; wide: narrow;
        rough: smooth; brave: cowardly; sweet: bitter; tall: short; cheap: expensive; safe: dangerous;
        easy: difficult; top: bottom; front: back; summer: winter; black: white; male: female; always: never;
        everything: nothing; laugh: cry; increase: decrease; add: subtract; multiply: divide; success: failure"""),
    "material": Relation("What is {} made of?", """
        a window: glass; a nail: iron; a sweater: wool; a book: paper; a tyre: rubber; a candle: wax;
        a leather shoe: animal skin; a wedding ring: gold; a brick: clay; a sandcastle: sand; a snowman: snow;
        a T-shirt: cotton; a plank: wood; bread: flour; cheese: milk; an omelette: eggs; wine: grapes;
        chocolate: cocoa; french fries: potatoes; ketchup: tomatoes; cider: apples; popcorn: corn; a statue: stone;
        toast: bread; peanut butter: peanuts; guacamole: avocados; a pickle: cucumber; a cloud: water droplets;
        a skeleton: bones; a forest: trees; a beach: sand; bacon: pork; a pearl necklace: pearls; sushi: rice"""),
    "use": Relation("What is a {} used for?", """
        broom: sweeping the floor; umbrella: keeping off the rain; key: opening a lock; hammer: hitting nails;
        pen: writing; oven: baking; fridge: keeping food cold; telescope: looking at stars; watch: telling the time;
        thermometer: measuring temperature; towel: drying yourself; toothbrush: cleaning teeth; needle: sewing;
        ladder: climbing up; shovel: digging; bed: sleeping; camera: taking pictures; ruler: measuring length;
        lamp: lighting a room; saw: cutting wood; calculator: adding numbers; map: finding the way;
        kettle: boiling water; lawnmower: cutting grass; razor: shaving; wallet: carrying money;
        parachute: landing safely; fishing rod: catching fish; bandage: covering a wound; eraser: removing pencil marks;
        microscope: seeing tiny things; piano: making music; whistle: making a loud sound; bin: holding rubbish;
        boat: crossing water; helmet: protecting the head; scarf: warming the neck; chair: sitting"""),
    "worker": Relation("Who {}?", """
        puts out fires: firefighter; teaches children: teacher; flies planes: pilot; bakes bread: baker;
        repairs teeth: dentist; cuts hair: barber; grows crops: farmer; delivers letters: postman;
        arrests thieves: police officer; treats sick people: doctor; treats sick animals: vet; mends pipes: plumber;
        paints pictures: artist; writes novels: author; sells meat: butcher; repairs cars: mechanic;
        cooks in a restaurant: chef; takes photographs: photographer; sews suits: tailor;
        designs buildings: architect; lends out books: librarian; catches fish: fisherman; serves at table: waiter;
        travels into space: astronaut; digs for coal: miner; makes furniture: carpenter; acts in films: actor;
        reports the news: journalist; sells flowers: florist; sails a ship: sailor; defends in court: lawyer;
        does magic tricks: magician; rules a kingdom: king; looks after patients: nurse; programs computers: programmer;
        fights in a war: soldier; makes people laugh in a circus: clown"""),
    "colour": Relation("What colour is {}?", """
        grass: green; snow: white; the sky: blue; a banana: yellow; coal: black; blood: red; a carrot: orange;
        chocolate: brown; a lemon: yellow; a tomato: red; milk: white; an elephant: grey; a flamingo: pink;
        a frog: green; the sun: yellow; a strawberry: red; tar: black; spinach: green; a crow: black;
        a pumpkin: orange; lettuce: green; salt: white; mud: brown; the ocean: blue; a pig: pink;
        a polar bear: white; a canary: yellow; ketchup: red; a cucumber: green; a fire engine: red;
        an aubergine: purple; lavender: purple; coffee: brown; a mouse: grey; flour: white; ash: grey"""),
    "kind": Relation("What is {}?", """
        a carrot: vegetable; an onion: vegetable; a cabbage: vegetable; an apple: fruit; a pear: fruit; a mango: fruit;
        a plum: fruit; a bus: vehicle; a truck: vehicle; a bicycle: vehicle; a tractor: vehicle; a hammer: tool;
        a screwdriver: tool; a wrench: tool; a drill: tool; a shirt: clothing; a jacket: clothing; a skirt: clothing;
        trousers: clothing; a violin: instrument; a trumpet: instrument; a flute: instrument; a piano: instrument;
        a sofa: furniture; a wardrobe: furniture; a chair: furniture; a bookcase: furniture; tea: drink;
        lemonade: drink; coffee: drink; beer: drink; tennis: sport; football: sport; hockey: sport; rugby: sport;
        an ant: insect; a wasp: insect; a beetle: insect; a mosquito: insect; a salmon: fish; a trout: fish;
        a tuna: fish; an eagle: bird; a pigeon: bird; a parrot: bird; France: country; Japan: country;
        Brazil: country; Egypt: country; iron: metal; copper: metal; silver: metal; a rose: flower; a tulip: flower;
        a daisy: flower; an oak: tree; a pine: tree; a birch: tree; Paris: city; London: city; Tokyo: city;
        a square: shape; a triangle: shape; a circle: shape; red: colour; blue: colour; measles: disease;
        cholera: disease; chess: game; poker: game; July: month; October: month; French: language; Spanish: language"""),
    "place": Relation("Where do you go to {}?", """
        buy bread: bakery; borrow a book: library; watch a film: cinema; catch a train: station; catch a plane: airport;
        swim: pool; sleep: bedroom; cook dinner: kitchen; pray: church; send a parcel: post office; save money: bank;
        see lions: zoo; have an operation: hospital; build a sandcastle: beach; take a shower: bathroom;
        buy medicine: pharmacy; see old paintings: museum; lift weights: gym; stay on holiday: hotel;
        ski: mountains; see a play: theatre; plant flowers: garden; eat out: restaurant; skate: ice rink;
        have your teeth checked: dentist; be sentenced by a judge: court; board a ship: harbour; get a degree: university;
        watch a football match: stadium; drink a beer: pub; have your hair cut: barber"""),
    "organ": Relation("What do you {} with?", """
        see: eyes; hear: ears; smell: nose; lick: tongue; chew: teeth; think: brain; breathe: lungs; kick: foot;
        hug: arms; point: finger; kiss: lips; kneel: knees; digest food: stomach; pump blood: heart; nod: head"""),
    "next": Relation("What comes next after {}?", """
        Monday: Tuesday; Thursday: Friday; Saturday: Sunday; January: February; March: April; June: July;
        September: October; spring: summer; autumn: winter; breakfast: lunch; morning: afternoon; lightning: thunder;
        the starter: main course; one: two; nine: ten; a wedding: honeymoon; the letter A: letter B;
        pregnancy: birth; childhood: adulthood; a flood of tears: drying your eyes; sunset: night"""),
    "effect": Relation("What happens when {}?", """
        ice gets warm: it melts; water gets very cold: it freezes; a glass falls on stone: it breaks;
        you do not eat: you get hungry; a plant gets no water: it wilts; you cut your finger: it bleeds;
        paper touches a flame: it burns; you run a long race: you get tired; a needle pricks a balloon: it pops;
        iron stands in the rain: it rusts; water boils: it turns to steam; a stone is thrown in a pond: it sinks;
        you hear a good joke: you laugh; the sun goes down: it gets dark; you stand in the rain: you get wet;
        sugar is stirred into tea: it dissolves; a ball is dropped: it falls; you press a light switch: the lamp goes on;
        you eat very salty food: you get thirsty; you plant a seed: it grows; a cork is put in water: it floats;
        you pull a rubber band: it stretches; you lose your way: you ask for directions; it is your birthday: you get presents;
        a magnet is near iron: it attracts it; you break a leg: you go to hospital; you tell a lie: people stop trusting you"""),
}

ORDERINGS: dict[str, tuple[str, str]] = {
    "bigger": ("The {} is bigger than the {}.", "flea, wasp, hamster, rat, hedgehog, fox, leopard, zebra, hippo, whale"),
}


def all_facts() -> list[Fact]:
    """Every fact of every table, in the order of the tables."""
    facts = []
    for name, relation in RELATIONS.items():
        for entry in relation.table.split(";"):
            subject, _, answer = " ".join(entry.split()).partition(": ")
            facts.append(Fact(name, subject, answer))
    return facts
