"Rules on what the web holds, and on texts that nobody should have to read"
import tracemalloc
import unicodedata

import pytest
from dirty_texts import alpaca, needs_real, wiki
from hypothesis import example, given, settings
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


@pytest.mark.parametrize('raw, text', [
    ('end of page\fNext page', 'end of page\nNext page'), ('a\vb\x85c', 'a\nb\nc'),
    ('a\u2028b\u2029c', 'a\nb\nc'), ('a\x1cb\x1dc\x1ed\x1fe', 'a\nb\nc\nd\ne'),
    ('a\r\nb\rc', 'a\nb\nc'), ('a\tb\xa0c\u3000d', 'a\tb\xa0c\u3000d'), ('a\x00b\ufeffc', 'abc'),
    ('    a += 1\n    return a', '    a += 1\n    return a'), ('\tx = 1', '\tx = 1'),
    ('\n \n    return a \n\n', '    return a'), (' Paris', 'Paris'), ('　　段落', '段落'),
    ('\f  a', '  a'), ('\ufeff  a', '  a'), (' \t', ''), ('\xa0 \xa0a', 'a')])
def test_normalize(raw, text): assert normalize(raw) == text


# \x85 is the ellipsis of Windows, too: where letters say so, it becomes one
BLANKS = [c for c in map(chr, range(0x3001)) if c.isspace() and c != '\x85']
TOKENS = st.sampled_from('end Next 茶 树， a.b, “x” 1,5 é'.split())


@given(st.lists(st.tuples(TOKENS, st.text(st.sampled_from(BLANKS), min_size=1, max_size=3))))
@settings(max_examples=300, deadline=None)
def test_cleaning_joins_nothing(pieces):
    "What a blank or a line break of any kind kept apart stays apart"
    raw, words = ''.join(map(''.join, pieces)), [word for word, _ in pieces]
    assert normalize(raw).split() == words
    lines = [line.split() for line in raw.replace('\x1f', '\n').splitlines() if line.strip()]
    left = clean_text(raw, CleanConfig(min_chars=0, min_letters=0)).text
    assert [line.split() for line in left.splitlines() if line.strip()] == lines


WRITTEN = st.lists(st.one_of(
    st.sampled_from(['点击查看更多', '© 2024 All rights reserved', '    return a', '',
                     'Home | About', '茶树原产于中国西南部。', 'Ä naïve line.', 'ä½\xa0å¥½', '浜哄伐鏅鸿兘']),
    st.text(st.characters(exclude_categories=[]), max_size=20)), max_size=8)


@given(WRITTEN, st.sampled_from(['\n', '\r\n', '\f', '\u2028', '\n\n']))
@example(['\x8dÂ\x80'], '\n')  # what stands in between goes, and then they are a character
@settings(max_examples=400, deadline=None)
def test_cleaning_twice_changes_nothing_more(lines, end):
    text = end.join(lines)
    for cfg in CleanConfig(min_chars=0, min_letters=0, max_broken=1), CleanConfig(clean='light'):
        out = clean_text(text, cfg).text
        assert clean_text(out, cfg).text == out
        assert len(out) <= len(unicodedata.normalize('NFC', text))


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
    ('本网站使用 Cookie 来改善您的体验', 'cookies'),
    ('This site uses cookies. Learn more', 'cookies'), ('Cookie Policy', 'cookies'),
    ('版权所有 © 某某公司', 'copyright'),
    ('Copyright © 2019-2024 Example Ltd. All Rights Reserved.', 'copyright'),
    ('未经授权许可，不得转载。', 'copyright'), ('沪ICP备12345678号-1', 'copyright'),
    ('（责任编辑：王某）', 'editing'), ('文章来源：某某网', 'editing'),
    ('轉載請註明出處', 'editing'), ('Share on Twitter', 'sharing'), ('Tweet', 'sharing'),
    ('长按识别二维码', 'sharing'), ('点赞 收藏 分享', 'sharing'), ('点击查看更多', 'more'),
    ('展开全文 ▼', 'more'), ('Read more »', 'more'),
    ('Subscribe to our weekly newsletter!', 'more'), ('Advertisement', 'more'),
    ('首页 > 体育 > 足球', 'navigation'), ('登录 | 注册', 'navigation'),
    ('Home / About / FAQ', 'navigation'), ('下一篇：春天的故事', 'navigation'),
    ('Skip to content', 'navigation'),
    ('We use cookies to improve your experience. Accept all cookies', 'cookies'),
    ('We use cookies and similar technologies to personalise ads', 'cookies'),
    ('By continuing to browse, you agree that we use cookies on this site.', 'cookies'),
    ('我们使用cookie以提升您的体验', 'cookies'), ('接受所有Cookie', 'cookies'),
    ('Accept all cookies', 'cookies'), ('版权所有：某某网', 'copyright'),
    ('© 2024 某某网 版权所有 京ICP备00000000号', 'copyright'), ('某某网 版权所有', 'copyright'),
    ('Copyright 2019 Example Ltd.', 'copyright'), ('(c) 2020 Example', 'copyright'),
    ('© Example Media 2020', 'copyright'), ('© 2024 All rights reserved', 'copyright'),
    ('Example Ltd 2020 All rights reserved.', 'copyright'),
    ('All rights reserved. No part may be copied.', 'copyright'),
    ('本网站内容未经许可，禁止转载或镜像', 'copyright'),
    ('版权所有，未经许可不得转载', 'copyright'), ('京公网安备11010802020134号', 'copyright'),
    ('责任编辑：小王', 'editing'), ('Share this', 'sharing'), ('Follow us on Facebook', 'sharing'),
    ('扫描下方二维码，关注我们', 'sharing'), ('扫一扫关注', 'sharing'),
    ('分享到：微信 微博 QQ空间', 'sharing'), ('分享到朋友圈', 'sharing'),
    ('欢迎关注我们的微信公众号', 'sharing'), ('微信关注某某公众号', 'sharing'),
    ('点击阅读全文', 'more'), ('点此下载', 'more'), ('点击这里查看原文', 'more'),
    ('Click here to read the full story', 'more'),
    ('Sign up for our free newsletter and get news first.', 'more'), ('上一页', 'navigation')])
def test_boilerplate(line, kind): assert _boilerplate_kind(f'  {line} ') == kind


@pytest.mark.parametrize('line', [
    '', '春眠不覺曉，處處聞啼鳥。', '版权所有者有权授权他人使用作品。', '首页设计应当简洁。',
    '登录系统以后，用户可以修改密码。', '他扫了一眼，转身走了。',
    '广告是一种传播方式。', 'Home', 'Cookies are baked at 180 degrees.',
    'Share prices fell on Monday.', 'He was asked to follow the river.',
    'The copyright expires after seventy years.',
    'Read the full story of the siege in chapter two.', 'Pin the map to the wall.',
    'They like to click and drag.', 'A | B | C', '1949 > 1937', '点赞是一种鼓励。',
    '关注民生问题。', 'Contact with water must be avoided.', '这本书的版权所有者是一家小出版社。',
    '版权所有是指作者对作品享有的权利。', '该公司是这首歌的版权所有人。',
    '他声称自己拥有全部版权，所有人都不相信。', 'We baked cookies for the children.',
    'We use cookies to teach fractions.', 'We ate the cookies on this sunny day.',
    'Our partners brought cookies to the meeting.', 'Browsers let their users reject all cookies.',
    '我们使用 cookie 保存会话状态。', '用户可以在浏览器里拒绝所有cookie。',
    'The copyright act of 1976 changed the term of protection.',
    'He registered the copyright in 1923 and sold it in 1930.',
    'Copyright law was reformed in 1998.', 'Copyright is a right of authors.',
    'Copyright 1976 was the name of an exhibition.', '(c) In 2003 the company moved to Boston.',
    '(c) a river in northern Europe', 'The phrase all rights reserved has no effect today.',
    'By 1952 every member wrote “all rights reserved” on the page.', '© is the sign of copyright.',
    '未经船长允许，任何人不得登岸。', '未经父母同意，不得使用手机。',
    '法律规定，未经作者许可，不得复制其作品，违者赔偿。', '办理ICP备案需要营业执照。',
    '公网安备案是网站的义务。', '责任编辑：负责稿件审读和加工，对质量负责的人。',
    '本文转载的数据来自统计局。', '他扫视全场，关注着每一个人。', '顾客扫描二维码付款，十分方便。',
    '他用手机扫描二维码，页面打开了。', '下一章介绍分词器。', '下一页讲述了他的童年。',
    '上一章我们讨论了语言。', 'Share it with a friend and write down what he says.',
    'Share this to the left half of the class.', 'Follow this to the river.',
    'Follow it with your finger.', 'Tweet is a word for the call of a bird.',
    'Read more books and fewer letters.', 'Click here and there on the map.',
    'Many readers subscribe to the newsletter of the society.',
    'The museum asks visitors to sign up for a newsletter in May.',
    '很多人用微信关注了政府的公众号。', '请关注公众卫生问题，公众号只是手段之一。',
    '分享到朋友圈的照片引起了争论。', '分享给好友的文件可以随时撤回。', '点击“下载”按钮开始安装。',
    '点击图片可以放大，再点击一次恢复。', '点击查看按钮后，窗口会打开。', '收藏和分享是两个功能。',
    '版权：一种民事权利', '版权所有权归作者。', '她问：“未经许可不得转载是什么意思？”',
    '网站底部通常写着“版权所有”四个字。', 'Advertisement is older than print.',
    'All rights reserved by the crown were listed in the charter.',
    'We set cookies on a plate for Santa.',
    'Cookie settings are stored in the profile of the user.', '下一章介绍分词器。' * 8])
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
