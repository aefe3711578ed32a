"""Texts as people have them: scripts, and lengths with heavy tails."""

import random
from collections.abc import Callable

WORDS = {
    "latin": "river garden window market teacher letter morning captain island winter bridge kitchen doctor village "
    "harbour mountain library station engine painter evening forest candle ticket summer music corner question "
    "answer number story carefully slowly because between without around behind before yellow quiet heavy early",
    "cyrillic": "река сад окно рынок учитель письмо утро остров зима мост кухня врач деревня гора поезд вечер лес "
    "свеча билет лето музыка вопрос ответ число быстро потому между без вокруг перед жёлтый тихий тяжёлый ранний",
    "cjk": "河流 花园 窗户 市场 老师 早晨 岛屿 冬天 桥梁 厨房 医生 村庄 港口 图书馆 車站 夕方 "
    "森林 切符 夏 音楽 質問 答え 数字 物語 ゆっくり なぜなら あいだ 黄色 静か 重い 早い",
    "arabic": "نهر حديقة نافذة سوق معلم رسالة صباح جزيرة شتاء جسر مطبخ طبيب قرية ميناء جبل مكتبة محطة مساء غابة شمعة "
    "تذكرة صيف موسيقى سؤال جواب رقم قصة ببطء لأن بين بدون حول قبل أصفر هادئ ثقيل",
    "emoji": "🙂 🎉 🚀 👍🏽 👩‍👩‍👧 🏳️‍🌈 🐈 🌧️ great thanks wow sure maybe never 1️⃣ ❤️ coffee train lunch",
    "marks": "e\u0301te\u0301 nai\u0308ve o\u0302te\u0301 cr\u00e8me pin\u0303ata A\u030angstro\u0308m "
    "vie\u0323\u0302t \u0915\u094d\u0937 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e19\u0e49\u0e33",
    "code": "def return for if else None x_1 = == += (value) [0] {key} lambda: import os print('hi') \\n # // int* "
    "a&&b foo.bar() std::cout i++; <T> -> \t",
    "latex": r"\frac{a}{b} $x^2$ \sum_{i=1}^n \alpha \leq \begin{cases} \end{cases} \mathbb{R} $$ y_i & \\ \text{if} "
    r"\boxed{42} \sqrt{2} \cdot",
    "table": "| name | value | --- | 12 | 3.5 | yes | no | total | 2024-01-31 | | a | \n",
}
SCRIPTS = tuple(WORDS)
NAMES = ["Ada", "Boris", "Chen", "Dalia", "Emre", "Fatou", "Greta", "Hugo"]
NAMES += ["Ines", "Jamal", "Kira", "Liam", "Mei", "Nora", "Omar", "Petra"]
TOWNS = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Quito", "Accra", "Minsk", "Hanoi", "Perth"]
EXACT = (8, 64, 256, 512)
LONGEST = 4_000
"""Most tokens of an answer."""
VALUES = (None, "", "N/A", "007", '"', "trailing ", "nan", "0", " ", "1e3", "NULL", "=1+1", "\ufeff", "a\r\nb")
"""What cells hold beside texts."""


def words(rng: random.Random, script: str, count: int) -> str:
    """So many words of a script, which end as a sentence does."""
    chosen = rng.choices(WORDS[script].split(" "), k=count)
    text = ("" if script == "cjk" else " ").join(chosen).strip()
    return f"{text}。" if script == "cjk" else f"{text}."


def log_normal(rng: random.Random) -> int:
    """A number of tokens: half of them below 40, one of a hundred above 1,000."""
    return max(1, min(LONGEST, round(rng.lognormvariate(3.6, 1.4))))


def text_of(rng: random.Random, script: str, tokens: int, count: Callable[[str], int], start: str) -> str:
    """A text of exactly so many tokens where the tokenizer allows it, by `count`; `start` is its beginning."""
    text, each = start, 8.0
    while (lacking := tokens - count(text)) > 6:
        longer = f"{text} {words(rng, script, max(1, int(lacking / each)))}"
        more = count(longer) - tokens
        if more > 0:
            each *= 1.5
            if each > 100:
                break
        else:
            each = max(1.0, 1.1 * (lacking + more) / max(1, int(lacking / each)))
            text = longer
    filled = f"{text}{' a' * max(0, lacking)}"
    return filled if count(filled) == tokens else text
