"Rules on what the web holds, and on texts that nobody should have to read"
import tracemalloc
import unicodedata

import pytest
from dirty_texts import alpaca, needs_real, wiki
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_nb.core import UserError
from lm_nb.data.cleaning import (
    _CONTROL, CleanConfig, RuleStats, _boilerplate_kind, _first_difference, _letter_share,
    _repetition, clean_text, _fix_mojibake, normalize, units)


# ---- settings

@pytest.mark.parametrize('wrong, message', [
    (dict(clean='lite'), "did you mean 'light'"),
    (dict(dedup='fuzzy'), 'expected near, exact, none'),
    (dict(min_letters=1.5), 'share from 0 to 1'), (dict(near_threshold=.99), '0.6 to 0.95'),
    (dict(clean_workers=-1), '0 or more'), (dict(min_chars=-1), '0 or more')])
def test_impossible_settings(wrong, message):
    with pytest.raises(UserError) as e: CleanConfig(**wrong)
    assert message in str(e.value) and '\n' not in str(e.value)


# ---- characters

@given(st.text(st.characters(exclude_categories=[]), max_size=60))
@settings(max_examples=500, deadline=None)
def test_normal_text_stays_normal(text):
    out = normalize(text)
    assert normalize(out) == out and unicodedata.is_normalized('NFC', out)
    assert not _CONTROL.search(out) and '\r' not in out
    out.encode()


@pytest.mark.parametrize('text', [
    '全形，「引」號　Ａ１！', 'שלום, עולם', 'مرحبا بالعالم', '👩\u200d👩\u200d👧 family 🇨🇳',
    'می\u200cخواهم', 'ﬁle, “quotes” … –', 'zwei\ttabs\tund\n\nzeilen', '½ ㎏ ① ™'])
def test_visible_text_stays(text):
    assert normalize(text) == text and _fix_mojibake(text) == text


@pytest.mark.parametrize('text', [
    '你好，世界！这是一个测试。', '第一章 引言：概述', 'The naïve café – “quoted” … it’s',
    'Größe, señor, Ångström', '東京タワー', 'Москва – столица России', '한국어 텍스트'])
@pytest.mark.parametrize('wrong', ['latin-1', 'sloppy-windows-1252'])
def test_utf8_read_as_western(text, wrong):
    import ftfy  # noqa: F401  registers the sloppy codecs
    damaged = text.encode().decode(wrong)
    assert _fix_mojibake(f'before\n{damaged}\n正常') == f'before\n{text}\n正常'


@pytest.mark.parametrize('text', ['人工智能', '机器学习', '学习编程语言', '语言模型训练', 'The 深度学习 course'])
def test_utf8_read_as_gbk(text):
    damaged = text.encode().decode('gb18030')
    assert damaged != text and _fix_mojibake(f'正常\n{damaged}') == f'正常\n{text}'


COMMON = ('的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学么之都好'
          '看起发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动方期它头经长儿回位分爱老因很给名法间斯知'
          '世什两次使身者被高已亲其进此话常与活正感，。！？、：；“”（）《》·…—0123456789abcXYZ ·×°é')


@given(st.text(st.sampled_from(COMMON), max_size=40))
@settings(max_examples=500, deadline=None)
def test_sound_text_is_never_repaired(text):
    if not set(text) & set('×é°·'): assert _fix_mojibake(text) == text
    assert clean_text(text, CleanConfig(clean='light')).text == normalize(text)


@needs_real
def test_no_real_text_is_taken_for_mojibake():
    assert len(alpaca()) == 1000
    assert [t for t in alpaca() + wiki() if _fix_mojibake(t) != t] == []


# ---- rules

@pytest.mark.parametrize('line, kind', [
    ('本网站使用 Cookie 来改善您的体验', 'cookies'), ('This site uses cookies. Learn more', 'cookies'),
    ('Cookie Policy', 'cookies'), ('版权所有 © 某某公司', 'copyright'),
    ('Copyright © 2019-2024 Example Ltd. All Rights Reserved.', 'copyright'),
    ('未经授权许可，不得转载。', 'copyright'), ('沪ICP备12345678号-1', 'copyright'),
    ('（责任编辑：王某）', 'editing'), ('文章来源：某某网', 'editing'), ('轉載請註明出處', 'editing'),
    ('Share on Twitter', 'sharing'), ('Tweet', 'sharing'), ('长按识别二维码', 'sharing'),
    ('点赞 收藏 分享', 'sharing'), ('点击查看更多', 'more'), ('展开全文 ▼', 'more'),
    ('Read more »', 'more'), ('Subscribe to our weekly newsletter!', 'more'),
    ('Advertisement', 'more'), ('首页 > 体育 > 足球', 'navigation'), ('登录 | 注册', 'navigation'),
    ('Home / About / FAQ', 'navigation'), ('下一篇：春天的故事', 'navigation'),
    ('Skip to content', 'navigation')])
def test_boilerplate(line, kind): assert _boilerplate_kind(f'  {line} ') == kind


@pytest.mark.parametrize('line', [
    '', '春眠不覺曉，處處聞啼鳥。', '版权所有者有权授权他人使用作品。', '首页设计应当简洁。',
    '登录系统以后，用户可以修改密码。', '他扫了一眼，转身走了。', '下一章介绍分词器。' * 8,
    '广告是一种传播方式。', 'Home', 'Cookies are baked at 180 degrees.',
    'Share prices fell on Monday.', 'He was asked to follow the river.',
    'The copyright expires after seventy years.',
    'Read the full story of the siege in chapter two.', 'Pin the map to the wall.',
    'They like to click and drag.', 'A | B | C', '1949 > 1937', '点赞是一种鼓励。',
    '关注民生问题。', 'Contact with water must be avoided.'])
def test_text_that_sounds_like_boilerplate(line): assert _boilerplate_kind(line) is None


@pytest.mark.parametrize('text', [
    '哈' * 500, '好评！' * 200, 'buy now ' * 200,
    '\n'.join(f'第{i}集 在线观看 高清下载 免费播放' for i in range(60)),
    '\n'.join(['the same line of text again and again'] * 40)])
def test_repetitive(text): assert clean_text(text).reason == 'repetition'


def test_short_texts_are_not_called_repetitive():
    assert _repetition('鹅，鹅，鹅，曲项向天歌。') == {}
    assert clean_text('鹅，鹅，鹅，曲项向天歌。白毛浮绿水，红掌拨清波。').text


def test_units_are_words_or_characters():
    assert len(units('The River Ash, the river')) == 5 and len(units('茶树，原产于中国。')) == 7
    assert (units('the RIVER ash') == units('The river — Ash!')).all()


@pytest.mark.parametrize('text', [
    'हिन्दी में चाय', 'ชาเป็นเครื่องดื่ม', 'שָׁלוֹם עוֹלָם', 'தேநீர் ஒரு பானம்'])
def test_letters_of_all_scripts(text): assert _letter_share(text) > .9


@pytest.mark.parametrize('text', ['12.5% 13.1% (0.07)', '😀😀😀 🎉', '|---|---|', ''])
def test_what_is_no_letter(text): assert _letter_share(text) < .3


@pytest.mark.parametrize('text, reason', [
    ('', 'empty'), (' \n\t\u3000', 'empty'), ('\x00\x01\ufeff', 'empty'), ('登录|注册', 'boilerplate'),
    ('\ufffd\ufffd text', 'broken characters'), ('锟斤拷锟斤拷', 'broken characters'),
    ('1 2 3 4 5 6 7 8 9 10 11 12', 'mostly symbols'), ('短。', 'too short')])
def test_reasons(text, reason):
    assert clean_text(text).reason == reason and clean_text(text).text == ''


@needs_real
def test_no_rule_changes_good_articles():
    assert [clean_text(t).steps for t in wiki()] == [()] * len(wiki())


# ---- what the rules did

def test_stats_show_the_place_of_a_change():
    stats, cfg = RuleStats(keep=1), CleanConfig()
    texts = ['<script>好</script>\n点击查看更多\n茶树原产于中国西南部。', 'tea\x00 ' + 'leaves' * 9, '哈' * 500]
    for text in texts: stats.add(text, clean_text(text), cfg)
    assert dict(stats.changed) == {'boilerplate': 1, 'invisible characters': 1}
    assert dict(stats.rejected) == {'repetition': 1} and stats.documents == 3
    assert dict(stats.removed) == {'boilerplate': 7, 'invisible characters': 1, 'repetition': 500}
    assert '[-点击查看更多⏎-]' in str(stats) and 'tea[-␀-] leaves' in str(stats)
    page = stats._repr_html_()
    assert '点击查看更多' in page and '<script>' not in page and page.count('<tr>') == 4


@pytest.mark.parametrize('before, after', [
    ('abc', 'abc'), ('', ''), ('', 'x'), ('x', ''), ('aa', 'a'), ('a\nb', 'b'), ('a\nb', 'a'),
    ('ab' * 99, 'b' * 50), ('\n\n', '\n')])
def test_a_difference_is_made_of_the_two_texts(before, after):
    left, removed, instead, right = _first_difference(before, after)
    for part in (left, removed, right):
        assert all(piece in before + '\n' for piece in part.split(' … '))
    assert all(piece in after for piece in instead.split(' … '))


def test_a_long_line_is_cleaned_in_bounded_memory():
    text = ''.join(chr(0x4e00 + i * 7919 % 12800) for i in range(200_000))  # 600 KB in one line
    tracemalloc.start()
    assert clean_text(text).reason in ('', 'repetition')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60*len(text)
