"""Countries and their capitals, asked both ways."""

from __future__ import annotations

from chroma_jax.synthesis.world.family import Family

# Countries with one capital that nobody disputes; a name with an article is written with it.
_CAPITALS = """
Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos_Aires; Armenia Yerevan;
Australia Canberra; Austria Vienna; Azerbaijan Baku; Bahrain Manama; Bangladesh Dhaka; Barbados Bridgetown; Belarus Minsk;
Belgium Brussels; Belize Belmopan; Bhutan Thimphu; Bosnia Sarajevo; Botswana Gaborone; Brazil Brasilia;
Bulgaria Sofia; Cambodia Phnom_Penh; Cameroon Yaounde; Canada Ottawa; Chad N'Djamena; Chile Santiago; China Beijing;
Colombia Bogota; Costa_Rica San_Jose; Croatia Zagreb; Cuba Havana; Cyprus Nicosia; Denmark Copenhagen; Djibouti Djibouti_City;
Dominica Roseau; Ecuador Quito; Egypt Cairo; El_Salvador San_Salvador; Eritrea Asmara; Estonia Tallinn; Ethiopia Addis_Ababa;
Fiji Suva; Finland Helsinki; France Paris; Gabon Libreville; the_Gambia Banjul; Georgia Tbilisi; Germany Berlin; Ghana Accra;
Greece Athens; Grenada Saint_George's; Guatemala Guatemala_City; Guinea Conakry; Guyana Georgetown; Haiti Port-au-Prince;
Honduras Tegucigalpa; Hungary Budapest; Iceland Reykjavik; India New_Delhi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad;
Ireland Dublin; Italy Rome; Jamaica Kingston; Japan Tokyo; Jordan Amman; Kazakhstan Astana; Kenya Nairobi; Kuwait Kuwait_City;
Kyrgyzstan Bishkek; Laos Vientiane; Latvia Riga; Lebanon Beirut; Lesotho Maseru; Liberia Monrovia; Libya Tripoli;
Liechtenstein Vaduz; Lithuania Vilnius; Luxembourg Luxembourg_City; Madagascar Antananarivo; Malawi Lilongwe;
Malaysia Kuala_Lumpur; the_Maldives Male; Mali Bamako; Malta Valletta; Mauritania Nouakchott; Mauritius Port_Louis;
Mexico Mexico_City; Moldova Chisinau; Mongolia Ulaanbaatar; Montenegro Podgorica; Morocco Rabat; Mozambique Maputo;
Namibia Windhoek; Nepal Kathmandu; the_Netherlands Amsterdam; New_Zealand Wellington; Nicaragua Managua; Niger Niamey;
Nigeria Abuja; North_Korea Pyongyang; Norway Oslo; Oman Muscat; Pakistan Islamabad; Panama Panama_City;
Papua_New_Guinea Port_Moresby; Paraguay Asuncion; Peru Lima; the_Philippines Manila; Poland Warsaw; Portugal Lisbon; Qatar Doha;
Romania Bucharest; Russia Moscow; Rwanda Kigali; Samoa Apia; San_Marino San_Marino_City; Saudi_Arabia Riyadh; Senegal Dakar;
Serbia Belgrade; Sierra_Leone Freetown; Singapore Singapore_City; Slovakia Bratislava; Slovenia Ljubljana; Somalia Mogadishu;
South_Korea Seoul; South_Sudan Juba; Spain Madrid; Sudan Khartoum; Suriname Paramaribo; Sweden Stockholm; Switzerland Bern;
Syria Damascus; Taiwan Taipei; Tajikistan Dushanbe; Tanzania Dodoma; Thailand Bangkok; Togo Lome; Tonga Nuku'alofa;
Tunisia Tunis; Turkey Ankara; Turkmenistan Ashgabat; Uganda Kampala; Ukraine Kyiv; the_United_Arab_Emirates Abu_Dhabi;
the_United_Kingdom London; the_United_States Washington; Uruguay Montevideo; Uzbekistan Tashkent; Vanuatu Port_Vila;
Venezuela Caracas; Vietnam Hanoi; Yemen Sanaa; Zambia Lusaka; Zimbabwe Harare
"""


def _facts() -> tuple[dict[str, str], ...]:
    pairs = (entry.split() for entry in _CAPITALS.replace("\n", " ").split(";"))
    return tuple(
        {"country": country.replace("_", " "), "city": city.replace("_", " ")}
        for country, city in pairs
    )


CAPITALS = _facts()
# A capital that is named after its country tells the answer.
_TELLING = ("City",)
_BACK = tuple(f for f in CAPITALS if not f["city"].endswith(_TELLING))

FAMILIES = (
    Family(
        name="capital",
        share=10,
        facts=CAPITALS,
        phrasings=(
            "What is the capital of {country}?",
            "What's the capital of {country}?",
            "Which city is the capital of {country}?",
            "Tell me the capital of {country}.",
            "Do you know the capital of {country}?",
            "Name the capital of {country}.",
            "What is the capital city of {country}?",
        ),
        held_phrasings=(
            "Can you tell me the capital of {country}?",
            "What city is the capital of {country}?",
        ),
        says="The capital of {country} is {city}.",
        follow_ups=("And of {country}?", "And the capital of {country}?", "What about {country}?"),
    ),
    Family(
        name="country",
        share=6,
        facts=_BACK,
        phrasings=(
            "Which country has the capital {city}?",
            "{city} is the capital of which country?",
            "{city} is the capital of what?",
            "What country is {city} the capital of?",
            "Of which country is {city} the capital?",
        ),
        held_phrasings=("What is {city} the capital of?",),
        says="{city} is the capital of {country}.",
        follow_ups=("And {city}?",),
    ),
)
