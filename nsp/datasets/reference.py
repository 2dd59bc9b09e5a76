"""Neutral sentences: the reference prompt set of mean and resample ablation where a recipe names none.

Written for nsp and under its licence. Plain statements on everyday subjects, so that a mean over them represents ordinary text.
"""

NEUTRAL_SENTENCES: tuple[str, ...] = (
    "The library opens at nine in the morning and closes at six.",
    "Water freezes at zero degrees and boils at one hundred.",
    "She put the keys on the table and went to make some tea.",
    "The train to the coast leaves from the second platform.",
    "Most of the apples from that tree are small and rather sour.",
    "He read the letter twice before he wrote an answer.",
    "In spring the river is wide and the fields beside it are wet.",
    "The museum keeps its oldest maps in a room without windows.",
    "A good loaf of bread needs flour, water, salt and time.",
    "They painted the kitchen yellow and the hall a pale blue.",
    "The committee will meet again on the first Monday of May.",
    "Our neighbours have two dogs, a cat and several chickens.",
    "Light from the nearest star takes four years to reach us.",
    "The recipe asks for two eggs and a cup of sugar.",
    "After the rain the road was covered with leaves.",
    "The engineer measured the bridge and drew a careful plan.",
    "Children walk to the school by the old market square.",
    "The shop on the corner sells paper, pens and ink.",
    "A small boat crossed the lake without a sound.",
    "The film lasts two hours and has a short break.",
    "He plays the violin and his sister plays the piano.",
    "The report lists the costs of heating for each month.",
    "Snow fell all night and by morning the hills were white.",
    "The farmer sold his wheat and bought a new plough.",
)
