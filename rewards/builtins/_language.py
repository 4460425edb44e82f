"""Which language is a text in? By script where a script belongs to one language, else by frequent words and letters.

A compact detector for rewards, no general one: it knows LANGUAGES and no others. A text in an unknown language that
shares its script with known ones may be taken for a neighbour (Danish for Swedish, Galician for Portuguese), and a text
of a few words may stay undecided. Code fences and addresses are left out, case does not matter. `align check` refuses
languages that are not known.
"""

from __future__ import annotations

import re
from collections import Counter

# Code points, both ends included. Scripts with several languages have a table below.
_SCRIPTS = {
    "latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)],
    "cyrillic": [(0x400, 0x52F)],
    "arabic": [(0x620, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)],
    "devanagari": [(0x900, 0x97F)],
    "han": [(0x3400, 0x4DBF), (0x4E00, 0x9FFF)],
    "ja": [(0x3040, 0x30FF)],
    "ko": [(0xAC00, 0xD7AF), (0x1100, 0x11FF), (0x3130, 0x318F)],
    "el": [(0x370, 0x3FF)],
    "he": [(0x590, 0x5FF)],
    "hy": [(0x530, 0x58F)],
    "ka": [(0x10A0, 0x10FF)],
    "bn": [(0x980, 0x9FF)],
    "pa": [(0xA00, 0xA7F)],
    "gu": [(0xA80, 0xAFF)],
    "ta": [(0xB80, 0xBFF)],
    "te": [(0xC00, 0xC7F)],
    "kn": [(0xC80, 0xCFF)],
    "ml": [(0xD00, 0xD7F)],
    "th": [(0xE00, 0xE7F)],
}

# Frequent words of each language, and letters that few others of its script have.
_WORDS = {
    "latin": {
        "en": "the of and to in is that it for was on with as are be this have from or by not but what all were "
        "we when your can said there an which their if will each about how them then these so some her "
        "would him has two more you he his they i at my do does did been should could who where why because "
        "also into than our me she its",
        "de": "der die das und ist nicht ein eine einen einem einer zu den dem mit von für auf sich auch es an "
        "werden aus er hat dass sie nach wird bei um am sind noch wie über so zum war haben nur oder aber "
        "vor zur bis mehr durch man dann soll wir ich ihr kann wenn was mein dein sein im als sehr hier "
        "diese dieser",
        "fr": "le la les et est un une des du de que qui dans pour pas sur au aux avec ce il elle ne se plus par "
        "je nous vous mais son sa ses ou leur comme cette ces été sont ont être avoir fait tout très bien "
        "où c'est d'un d'une l'on mon ma mes votre notre",
        "es": "el la los las y es un una de del que en por para con no se lo su sus al más como pero este esta "
        "esto ha son fue muy también hay ser está están desde cuando todo todos yo nosotros usted ya porque "
        "hasta entre sobre tiene donde mi mis tu cada",
        "pt": "o a os as e é um uma de do da dos das que em no na nos nas por para com não se ao mais como mas "
        "foi ele ela seu sua ou quando muito há já está também só pelo pela até isso entre era depois sem "
        "mesmo são você eu nós meu minha este esta essa ser tem",
        "it": "il lo la i gli le e è un una di del della dei delle che in per con non si al alla da dal nel nella "
        "sono più come ma anche questo questa o ha ho suo sua loro essere molto perché quando dove io noi "
        "voi mio mia cosa se ci tutti c'è sul sulla ai degli dell'",
        "nl": "de het een en van is dat niet in op te zijn voor met die aan er om ook als maar bij door naar uit "
        "nog wel wordt worden heeft hebben ik je wij hij zij we deze dit kan dan over onze mijn geen veel "
        "meer",
        "sv": "och att det som en ett är på för med inte av till den har de jag om så men var från vi kan ska "
        "eller när hur mycket också sin sina efter under alla nu han hon där här vara mycket finns",
        "fi": "ja on ei se että oli hän mutta joka kun niin myös kuin ovat tai jos minä sinä me te he tämä ne "
        "mitä olla sen ole hyvin vain jo voi olen sekä mukaan jotka kanssa sitten nyt minun mikä miten "
        "koska kaikki",
        "sw": "na ya wa kwa ni za la katika cha kama hii huu hiyo hizi ambayo ambao yake wake kuwa si sana pia "
        "lakini au watu mimi wewe yeye sisi wao kila vya hayo hivyo bado baada kabla yangu wangu hili hapa "
        "ili moja mtu siku",
        "vi": "và là của có không được cho các một trong người với những để này đã về khi tôi bạn như từ cũng đến "
        "nhiều ra vào lại thì sẽ đó rất làm chúng ta phải hơn nếu trên năm ngày theo nhưng sự việc",
        "pl": "i w nie na się z do to że jest o jak po co ale za od tak są dla przez przy czy już tylko był była "
        "było może ich jego jej też który która które ja my wy oni bardzo oraz ten ta",
        "tr": "ve bir bu da de için ile çok ne daha gibi var olarak kadar ben sen biz siz onlar değil ama en olan "
        "her sonra ki mi o şey iyi ise veya göre bunu nasıl",
        "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena tersebut bisa ada "
        "mereka lebih sudah atau saat oleh menjadi kami anda adalah dia telah seperti kita",
        "ro": "și de la în nu este un o că cu pe să din mai care pentru sunt am ai a au dar sau ca lui prin fost "
        "după acest această când foarte eu noi voi ei cum unde fi",
    },
    "cyrillic": {
        "ru": "и в не на что он я с как это по но они мы она к у из за от то все вы так же бы было был для о быть "
        "очень если или его ее есть когда только уже можно также мой этот",
        "bg": "и на да се в за от не е са с че по това как но ще си като към а до го или има тя той те аз ние вие "
        "което които който която при след много може съм бъде още ми му",
        "uk": "і в на не що з до як це та за у я він вона вони ми від але про був було бути так або його її для "
        "по також якщо коли є дуже",
    },
    "arabic": {
        "ar": "في من على إلى أن هذا هذه التي الذي ما لا عن مع كان كانت هو هي كل بعد قبل أو ثم إن لم لن قد بين ذلك "
        "أنا نحن أنت هم هناك عند حتى يمكن",
        "fa": "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز می شود بود شد من ما او شما آنها اما یا "
        "های هر باید اگر چه خیلی نمی کند کنید دارد",
        "ur": "کے کی میں ہے اور سے کا کو پر یہ نے کہ ہیں ایک وہ بھی جو کر تو نہیں تھا تھی ہم آپ اس ان اپنے لیے گا "
        "گی ہو ہوں کیا ہوتا ساتھ",
    },
    "devanagari": {
        "hi": "है हैं के का की में से और को पर यह वह नहीं ने कि जो भी तो था थे थी एक इस उस हम मैं आप लिए होता "
        "करने कर रहा रहे अपने साथ बहुत हो जा सकते गया ये वे क्या या",
        "mr": "आहे आहेत आणि मी तो ती ते हे ही हा या नाही होते होता होती की तर पण आपण आम्ही तुम्ही मध्ये साठी खूप "
        "केले केला असे असते असतो आपल्या त्या त्यांनी माझ्या माझे करणे काही झाले",
        "ne": "छ छन् र हो यो त्यो पनि गर्न गर्छ भएको हुन्छ छैन थियो थिए म हामी तपाईं तिमी उनी लागि गरेको गर्ने "
        "भने तर धेरै हुने गर्नु हाम्रो मेरो यस गरी भयो छु छौं गर्दछ",
    },
}
_LETTERS = {
    "de": "ß", "es": "ñ¿¡", "pt": "ãõ", "fr": "œ", "pl": "łżźśćń", "tr": "ğış", "ro": "țșăţ",
    "vi": "đơưạảấầẩậắằẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "ru": "ыэё", "bg": "ъ", "uk": "іїєґ", "ar": "كيةىأإ", "fa": "پچژگ", "ur": "ٹڈڑںےہھ", "mr": "ळ",
}  # fmt: skip
_TABLES = {
    script: {language: frozenset(words.split()) for language, words in table.items()}
    for script, table in _WORDS.items()
}
LANGUAGES = frozenset({s for s in _SCRIPTS if len(s) == 2} | {"zh"} | {lang for t in _WORDS.values() for lang in t})

_NOISE = re.compile(r"```.*?(?:```|\Z)|https?://\S+", re.DOTALL)
_EDGES = ".,;:!?…()[]{}<>«»\"“”„'’‘*_#-–—|/\\`।۔؟،؛。！？，、"
_LEAST = 0.06  # of the words, or their worth in letters: less is no evidence of any of these languages
_KANA = 0.1  # the share that any Japanese sentence has; a Chinese one may quote a letter
_LONGEST = 20_000  # characters that are looked at


def check_language(code: str) -> str:
    """The ISO 639-1 code without its region, in lower case ("zh-cn" is "zh"). ValueError where it is not known."""
    short = code.lower().replace("_", "-").partition("-")[0]
    if short not in LANGUAGES:
        raise ValueError(f"the language {code!r} cannot be told; known: {', '.join(sorted(LANGUAGES))}")
    return short


def detect(text: str) -> str | None:
    """The ISO 639-1 code of the text's main language; None where it has no letters or nothing decides."""
    text = _NOISE.sub(" ", text)[:_LONGEST].lower()
    counts = Counter(script for letter in text if (script := _script(letter)))
    if not counts:
        return None
    east = counts["ja"] + counts["han"]
    if east > counts.total() / 2:
        return "ja" if counts["ja"] > _KANA * east else "zh"
    script, count = counts.most_common(1)[0]
    if count <= counts.total() / 2:
        return None
    return _by_words(text, script) if script in _TABLES else script


def has_letters(text: str) -> bool:
    """Whether there is anything that could be in a language."""
    return any(_script(letter) or letter.isalpha() for letter in _NOISE.sub(" ", text))


def _script(letter: str) -> str | None:
    code = ord(letter)
    if code < 0x250 and not letter.isalpha():
        return None
    for script, ranges in _SCRIPTS.items():
        if any(low <= code <= high for low, high in ranges):
            return script
    return None


def _by_words(text: str, script: str) -> str | None:
    """The language of the script whose frequent words make up most of the text; a telling letter counts a word's half,
    a word of several languages as a part for each."""
    words = [w for raw in text.split() if (w := raw.strip(_EDGES))]
    table = _TABLES[script]
    scores = dict.fromkeys(table, 0.0)
    for word in words:
        spoken = [language for language, known in table.items() if word in known]
        for language in spoken:
            scores[language] += 1 / len(spoken) if len(spoken) < 4 else 0.1
        for language in table:
            if any(letter in _LETTERS.get(language, "") for letter in word):
                scores[language] += 0.5
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    (best, most), (_, next_most) = ranked[:2]
    if most < _LEAST * len(words) or most <= next_most:
        return None
    return best
