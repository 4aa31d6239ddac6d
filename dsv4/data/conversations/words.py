"""The words of generated conversations."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


THINGS = words(
    """apple banana bread butter candle carpet chair cherry clock coat coffee copper cotton cup desk diamond door drum
    egg engine flute fork garlic glass globe glove gold grape guitar hammer hat honey iron ivory jacket jar kettle key
    kite ladder lamp lemon lens lentil letter lock mango map marble mask melon milk mirror mug needle nickel oil olive
    onion orange oven paper pearl pencil pepper piano pillow pipe plate plum pot potato quilt radio rice ring robe rope
    ruby saddle salt scarf shell shelf shirt shoe silk silver soap sofa spoon stamp steel stool stove sugar table tea
    tent ticket timber tin tomato towel train trumpet tulip vase velvet violin wagon wallet walnut watch wheat wheel
    window wine wood wool zinc"""
)

PLACES = words(
    """Albania Angola Austria Belgium Bolivia Brazil Canada Chad Chile China Cuba Denmark Egypt Finland France Gabon
    Germany Ghana Greece Haiti Hungary Iceland India Iran Iraq Ireland Italy Jamaica Japan Jordan Kenya Kuwait Laos
    Latvia Malta Mexico Mongolia Nepal Niger Norway Oman Panama Peru Poland Portugal Qatar Romania Rwanda Spain Sudan
    Sweden Syria Togo Tunisia Turkey Uganda Vietnam Yemen"""
)

CITIES = words(
    """Accra Athens Bern Boston Bonn Cairo Delhi Dublin Ghent Hanoi Havana Jena Kiev Kyoto Lagos Leeds Lima Lisbon
    London Lyon Madrid Milan Minsk Munich Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tokyo Tunis Turin
    Vienna Warsaw York Zurich"""
)

PEOPLE = words(
    """Ada Alan Alice Amir Anna Ben Bob Carla Chen Clara David Diego Elena Emma Eric Eva Felix Frank Grace Hana Hugo
    Ida Ivan James Jane Jonas Julia Karl Kofi Lara Lena Leo Lily Liu Lucas Maria Mark Maya Mia Mila Nadia Nina Noah
    Olga Omar Oscar Paul Peter Petra Rosa Ruth Sam Sara Sofia Tara Tom Vera Victor Wang Yuki Zoe"""
)

COLOURS = ("red", "green", "blue", "black", "white", "brown", "yellow", "purple", "pink", "grey", "orange", "silver")
DRINKS = ("tea", "coffee", "milk", "water", "juice", "cocoa", "wine", "beer")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

COMMON = words(
    """able about above accept across action active actual add address adult advance advice afraid after again age agree
    air alarm alive allow almost alone along also always amount ancient angle angry animal annual another answer appear
    apply area arm army around arrive art aside ask asleep attack author autumn average avoid awake aware away baby back
    bad bag bake balance ball band bank bar base basic basket bath beach bean bear beat beauty because become bed before
    begin behind believe bell belong below bench bend best better between beyond big bird birth bite bitter blame blank
    blind block blood blow board boat body bone book border boring born borrow both bottle bottom bowl box boy brain
    branch brave break breath brick bridge brief bright bring broad brother brush build burn bus busy buy cabin cake
    call calm camera camp canal cap capital captain car card care carry case castle cat catch cause cave ceiling center
    century certain chain chance change chapter cheap check cheese chest chicken chief child choice choose church circle
    citizen city class clean clear clever cliff climb close cloth cloud club coal coast cold collect college column come
    common compare complete concert consider contain control cook cool copy corn corner correct cost could count country
    couple courage course court cousin cover cow crazy cream create cross crowd crown cruel cry culture curious current
    curtain curve custom cut daily damage dance danger dark date daughter day dead deal dear debt decide deep deer
    defend degree delay deliver demand depend describe desert design detail develop differ dig dinner direct dirty
    discover dish distance divide doctor dog dollar double doubt down dozen draw dream dress drink drive drop dry duck
    dust duty each eager ear early earth east easy eat edge effect effort eight either elbow elect electric elephant
    eleven else empty end enemy energy enjoy enough enter entire equal error escape even evening event ever every exact
    example except excite exist expect expert explain express extra eye face fact factory fail fair faith fall false
    fame family far farm fashion fast fat father fault favor fear feather feed feel female fence few field fierce fight
    figure fill final find finger finish fire firm first fish fit five fix flag flame flat flavor flight float flood
    floor flour flower fly fold follow food foot force foreign forest forget forgive form fortune forward four fox frame
    free freeze fresh friend front fruit full fun funny future gain game garden gas gate gather general gentle get gift
    girl give glad goat goal gold good govern grain grand grass great green greet ground group grow guard guess guest
    guide habit hair half hall hand handle hang happen happy harbor hard harm hate have head heal health hear heart heat
    heavy height help hen hero hide high hill history hit hold hole holiday home hope horn horse hospital host hot hotel
    hour house how huge human humor hundred hungry hunt hurry hurt husband ice idea ill image improve inch include
    increase indeed inform insect inside instead invent invite island issue item job join joke journey joy judge jump
    just justice keen keep kick kind king kiss kitchen knee knife knock know labor lack lady lake land language large
    last late laugh law lay lazy lead leaf learn least leather leave left leg lend length less lesson let level library
    lie life lift light like limit line lion lip liquid list listen little live load loan local lonely long look loose
    lose lot loud love low luck lunch machine mad magic mail main major make male man manage manner many march market
    marry master match matter may meal mean measure meat medal medicine meet member memory mention merry message metal
    middle might mild mind minute miss mistake mix model modern moment money monkey month moon moral more morning most
    mother motion mountain mouse mouth move much mud murder muscle museum music must nail name narrow nation native
    nature near neat neck need neighbor neither nerve nest net never new news next nice night nine noble noise none noon
    normal north nose note nothing notice novel now number nurse obey object ocean odd offer office often old once one
    only open opinion order ordinary organ other ought our outside over own pack page pain paint pair palace pale pan
    parent park part partner party pass past path patient pattern pause pay peace pen people perfect perhaps person
    photo pick picture piece pig pilot pink place plain plan planet plant play please plenty pocket poem poet point
    poison police polite pool poor popular port possible pour powder power practice praise pray prefer prepare present
    press pretty prevent price pride priest prince print prison private prize problem produce profit promise proof
    proper protect proud prove public pull punish pupil pure purpose push quality quarter queen question quick quiet
    quite rabbit race railway rain raise range rapid rare rather raw reach read ready real reason receive record reduce
    refuse region regret relief remain remember remind remove rent repair repeat reply report request rescue respect
    rest result return reward rich ride right rise risk river road roast rob rock roll roof room root rough round row
    royal rub rude rule run rush sad safe sail same sand save say scale scene school science sea search season seat
    second secret see seed seem sell send sense separate serious servant serve settle seven several severe sew shade
    shadow shake shall shame shape share sharp sheep sheet shine ship shock shoot shop shore short should shoulder shout
    show shut sick side sight sign silent silly simple since sing single sink sister sit situation six size skill skin
    skirt sky sleep slide slip slow small smell smile smoke smooth snake snow social society soft soil soldier solid
    some son song soon sore sort soul sound soup south space spare speak special speech speed spell spend spirit spite
    split spoil sport spot spread spring square stage stairs stand star start state station stay steal steam steep step
    stick still sting stone stop store storm story straight strange stream street strength stretch strict strike string
    strong student study stupid subject success such sudden suffer suggest suit summer sun supper supply support sure
    surface surprise swallow swear sweat sweep sweet swim swing sword system tail take talk tall taste tax teach team
    tear tell temple ten tender term test than thank that theory there thick thief thin thing think thirst this thorough
    thousand thread threat three throat through throw thumb thunder thus tide tie tight till time tire title today toe
    together tomorrow tongue tonight too tool tooth top total touch tough tour toward town toy track trade trap travel
    treasure treat tree tremble tribe trick trip trouble true trunk trust truth try tube tune turn twelve twenty twice
    twist two type ugly uncle under unit unite until up upper upset urge use usual valley value vary vast verb very
    victory view village violent virtue visit voice vote voyage wage waist wait wake walk wall wander want war warm warn
    wash waste water wave way weak wealth weapon wear weather wedding weed week weigh welcome well west wet what when
    where whether which while whip whisper white who whole why wide wife wild will win wind wing winter wire wise wish
    with woman wonder word work world worm worry worse worth wound wrap wreck wrist write wrong yard year yes yesterday
    yet yield young youth zero zoo"""
)
"""For copying: so many that most parts that words are read in occur among them."""

REAL = frozenset(word.lower() for word in (*THINGS, *PLACES, *CITIES, *PEOPLE, *COLOURS, *DRINKS, *DAYS, *COMMON))
"""No made-up word is one of them."""
