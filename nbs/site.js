// What the pages need beyond smalldocs: the switch between languages, a menu that shows where one is,
// the contents on a narrow screen, light paper, and a search that reads Chinese.

// the switch stays at the heading that is being read: the first at the top of the screen, below the
// bar, or else the last above it; so there and back is the same place
document.querySelectorAll('a.language').forEach(a => a.addEventListener('click', () => {
  if ('other' in a.dataset) return  // it leads to another page
  const bar = document.querySelector('#quarto-header')?.offsetHeight || 0
  const top = h => h.getBoundingClientRect().top
  const heads = [...document.querySelectorAll('main [data-anchor-id]')].filter(h => top(h) < 130)
  a.hash = (heads.find(h => top(h) >= bar) || heads.at(-1))?.dataset.anchorId || ''
}))

// the menu is long: it shows where one is
const menu = document.querySelector('#quarto-sidebar'), here = menu?.querySelector('.active')
if (here) menu.scrollTop += here.getBoundingClientRect().top - menu.clientHeight / 2

// a narrow screen has no margin: the contents of the page stand, folded, below its title
const toc = document.querySelector('#TOC')
if (toc) {
  const contents = document.createElement('details')
  contents.className = 'contents'
  contents.innerHTML = `<summary>${toc.querySelector('#toc-title').textContent}</summary>` +
    toc.querySelector('ul').outerHTML.replace(/ (id|class)="[^"]*"/g, '')
  ;(document.querySelector('main .about') || document.querySelector('#title-block-header')).after(contents)
}

// paper is light, whatever the screen is
const root = document.documentElement
const swapTheme = () => {
  document.querySelectorAll('link.quarto-color-scheme').forEach(l =>
    l.media = l.media === 'all' ? 'not all' : 'all')
  root.classList.toggle('quarto-dark')
}
let darkScreen = false
addEventListener('beforeprint', () => {
  darkScreen = root.classList.contains('quarto-dark')
  if (darkScreen) swapTheme()
})
addEventListener('afterprint', () => { if (darkScreen) swapTheme() })

// what is looked for: words by their beginning, and pairs of Chinese characters
const terms = query => (query.toLowerCase().match(/[a-z0-9_]+|[\u3400-\u9fff]+/g) || []).flatMap(w =>
  w > '\u3400' && w.length > 2 ? [...w.slice(1)].map((c, i) => w[i] + c) : [w])
const count = (text, t) => t > '\u3400' || !text.includes(t) ? text.split(t).length - 1
  : text.match(RegExp('(?<![a-z0-9])' + t, 'g'))?.length || 0

// rare terms count most, titles more than text, the language of the page more than the other
// (tools/site.py has the same rules, to check that what tools/search.txt names is found)
const ranked = (entries, query, zh) => {
  const all = entries.map(entry => ({entry, page: entry.href.split('#')[0], points: 0, seen: 0}))
  let most = 0
  for (const t of terms(query)) {
    const hits = all.map(s => [s, ...s.entry.fields.map(text => count(text, t))])
      .filter(([_, ...n]) => n.some(Boolean))
    if (!hits.length && t > '\u3400') continue  // a pair across two words
    const rare = Math.log(1 + entries.length / (hits.length || .5))
    most += rare
    for (const [s, title, section, text] of hits) {
      s.points += rare * (3 * (title > 0) + 2 * (section > 0) + 2 * text / (text + 2))
      s.seen += rare
    }
  }
  for (const s of all) s.points *= s.seen / (1 + (s.page.startsWith('zh/') !== zh))
  const of = {}
  return all.filter(s => s.seen && s.seen >= most / 2).sort((a, b) => b.points - a.points)
    .filter(s => (of[s.page] = (of[s.page] || 0) + 1) <= 3)
}

// Fuse, with which smalldocs searches, is asked when no page has the words: it forgives typing errors
if (window.Fuse) window.Fuse = class extends window.Fuse {
  constructor(entries, options) {
    super(entries, options)
    this.entries = entries
    for (const e of entries) Object.defineProperty(e, 'fields', {
      value: [e.title, e.section, e.text].map(text => text.toLowerCase())})
  }
  search(query, options) {
    const found = ranked(this.entries, query, document.documentElement.lang === 'zh-CN')
    return found.length ? found.slice(0, options.limit).map(s => ({item: s.entry}))
      : super.search(query, options)
  }
}
