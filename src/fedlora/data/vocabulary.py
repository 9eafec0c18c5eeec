"""Word lists of the `skills` data.

Plain ASCII, well known, and free of cases with two right answers: no country with two capitals, with a
capital that moved or shares its name, or with an article in its name.
"""

from __future__ import annotations


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, _, value in (line.partition(": ") for line in _items(text)))


def _items(text: str) -> tuple[str, ...]:
    return tuple(item for part in text.split(",") if (item := " ".join(part.split())))


CAPITALS = _pairs("""
    Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires, Armenia: Yerevan,
    Australia: Canberra, Austria: Vienna, Azerbaijan: Baku, Bahrain: Manama, Bangladesh: Dhaka, Barbados: Bridgetown,
    Belarus: Minsk, Belgium: Brussels, Botswana: Gaborone, Brazil: Brasilia, Bulgaria: Sofia, Cambodia: Phnom Penh,
    Canada: Ottawa, Chile: Santiago, China: Beijing, Colombia: Bogota, Croatia: Zagreb, Cuba: Havana, Cyprus: Nicosia,
    Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo, Estonia: Tallinn, Ethiopia: Addis Ababa, Fiji: Suva,
    Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra, Greece: Athens, Haiti: Port-au-Prince,
    Honduras: Tegucigalpa, Hungary: Budapest, Iceland: Reykjavik, India: New Delhi, Iran: Tehran, Iraq: Baghdad,
    Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kenya: Nairobi, Kuwait: Kuwait City,
    Kyrgyzstan: Bishkek, Laos: Vientiane, Latvia: Riga, Lebanon: Beirut, Liberia: Monrovia, Libya: Tripoli,
    Lithuania: Vilnius, Madagascar: Antananarivo, Malaysia: Kuala Lumpur, Mali: Bamako, Malta: Valletta,
    Mexico: Mexico City, Mongolia: Ulaanbaatar, Morocco: Rabat, Mozambique: Maputo, Namibia: Windhoek,
    Nepal: Kathmandu, New Zealand: Wellington, Nicaragua: Managua, Nigeria: Abuja, North Korea: Pyongyang,
    Norway: Oslo, Oman: Muscat, Pakistan: Islamabad, Panama: Panama City, Paraguay: Asuncion, Peru: Lima,
    Poland: Warsaw, Portugal: Lisbon, Qatar: Doha, Romania: Bucharest, Russia: Moscow, Rwanda: Kigali,
    Saudi Arabia: Riyadh, Senegal: Dakar, Serbia: Belgrade, Sierra Leone: Freetown, Slovakia: Bratislava,
    Slovenia: Ljubljana, Somalia: Mogadishu, South Korea: Seoul, Spain: Madrid, Sudan: Khartoum, Sweden: Stockholm,
    Switzerland: Bern, Syria: Damascus, Thailand: Bangkok, Tunisia: Tunis, Turkey: Ankara, Uganda: Kampala,
    Ukraine: Kyiv, Uruguay: Montevideo, Uzbekistan: Tashkent, Venezuela: Caracas, Vietnam: Hanoi, Zambia: Lusaka,
    Zimbabwe: Harare
""")

MONTHS = _items("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")

NAMES = _items("""
    Adam, Alice, Anna, Ben, Carla, Clara, David, Diana, Elena, Emma, Erik, Felix, Frank, Grace, Hannah, Henry, Ida,
    Ivan, Jack, Jane, Julia, Karl, Kate, Laura, Leo, Lucy, Maria, Mark, Martin, Nina, Nora, Oliver, Oscar, Paul, Peter,
    Robert, Rosa, Sara, Simon, Thomas
""")

CITIES = _items("""
    Athens, Berlin, Boston, Cairo, Chicago, Dallas, Delhi, Dublin, Geneva, Hamburg, Lima, Lisbon, London, Madrid, Miami,
    Milan, Moscow, Munich, Oslo, Paris, Prague, Rome, Seattle, Sydney, Tokyo, Toronto, Vienna, Warsaw
""")

JOBS = _items("""
    actor, artist, baker, chef, dentist, doctor, driver, farmer, gardener, judge, lawyer, nurse, painter, pilot,
    plumber, sailor, singer, teacher, waiter, writer
""")

WORDS = _items("""
    apple, bird, blue, book, bread, bridge, chair, cloud, cold, dance, door, dream, earth, fire, fish, flower, forest,
    garden, glass, gold, green, hand, heart, hill, horse, house, ice, iron, king, lake, lamp, leaf, light, milk, moon,
    mountain, music, night, ocean, paper, queen, rain, red, river, road, salt, ship, silver, sky, snow, song, star,
    stone, storm, summer, sun, table, tree, water, wind, window, winter, wolf, wood
""")

THINGS = _items("""
    album, app, bike, book, breakfast, bus ride, cake, camera, class, coffee, concert, dinner, film, flight, game,
    guide, hotel, laptop, lecture, lunch, meal, movie, museum, phone, pizza, play, restaurant, room, service, show,
    song, soup, story, tour
""")

PRAISE = _items("""
    amazing, beautiful, brilliant, delightful, excellent, fabulous, fantastic, great, impressive, lovely, magnificent,
    outstanding, perfect, splendid, superb, terrific, wonderful
""")

BLAME = _items("""
    abysmal, appalling, awful, bad, disappointing, dismal, dreadful, frustrating, horrible, inferior, lousy, miserable,
    pathetic, poor, terrible, unpleasant, worthless
""")
