// What is wrong with the page that a browser shows: lines for a person; tools/look.py runs it.
(width => {
  const found = new Set(), all = selector => [...document.querySelectorAll(selector)]
  const name = e => [e.parentElement, e].map(e => e.tagName.toLowerCase() +
    (e.classList.length ? '.' + e.classList[0] : '')).join(' > ')
  const shown = e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden'
  all('details').forEach(e => { e.open = true })

  const lang = location.pathname.includes('/zh/') ? 'zh-CN' : 'en'
  if (document.documentElement.lang !== lang) found.add(`the language is not ${lang}`)
  for (const e of all('h1, h2, h3, h4, h5, h6')) if (!e.textContent.trim()) found.add('an empty heading')
  for (const e of document.images)
    if (!e.complete || !e.naturalWidth) found.add(`no picture: ${e.src.slice(0, 60)}`)

  // nothing sticks out of the screen, but for what scrolls by itself
  const scrolls = e => e && e !== document.body &&
    (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
  if (document.documentElement.scrollWidth > width) found.add('the page is wider than the screen')
  for (const e of all('main *')) {
    const r = e.getBoundingClientRect()
    if (r.width && r.right > width + 1 && !scrolls(e.parentElement)) found.add(`sticks out: ${name(e)}`)
  }
  const bar = width < 992 ? '.quarto-secondary-nav :is(button, nav, .phone-search, a.language, ' +
    '.quarto-color-scheme-toggle)' : '#quarto-sidebar :is(.sidebar-title, .sidebar-search, ' +
    'a.language, .quarto-color-scheme-toggle)'
  const boxes = all(bar).filter(e => shown(e) && !e.closest('ol, .dropdown-menu'))
    .map(e => [e, e.getBoundingClientRect()])
  for (const [e, a] of boxes) for (const [f, b] of boxes)
    if (e !== f && !e.contains(f) && !f.contains(e) && a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 1 && b.top < a.bottom - 1) found.add(`${name(e)} covers ${name(f)}`)

  // text stands out from its ground: WCAG 2's ratio, 4.5 or more, 3 for large letters
  const rgba = text => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number).concat(1).slice(0, 4)
  const over = (top, ground) => ground.slice(0, 3).map((v, i) => top[i] * top[3] + v * (1 - top[3]))
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  const known = new Map([[null, [[255, 255, 255], 1]]])
  const ground = e => {  // the colour behind it, and how opaque it is
    if (!known.has(e)) {
      const [below, opacity] = ground(e.parentElement), s = getComputedStyle(e)
      known.set(e, [over(rgba(s.backgroundColor), below), opacity * s.opacity])
    }
    return known.get(e)
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  const parents = new Set()
  while (texts.nextNode()) if (texts.currentNode.data.trim()) parents.add(texts.currentNode.parentElement)
  for (const e of parents) {
    if (/SCRIPT|STYLE/.test(e.tagName) || !shown(e)) continue
    const s = getComputedStyle(e), [below, opacity] = ground(e)
    const [r, g, b, a] = rgba(e.namespaceURI.endsWith('svg') ? s.fill : s.color)
    const [x, y] = [over([r, g, b, a * opacity], below), below].map(light).sort((p, q) => p - q)
    const size = parseFloat(s.fontSize), large = size >= 24 || size >= 18.6 && s.fontWeight >= 700
    const ratio = (y + .05) / (x + .05)
    if (ratio < (large ? 3 : 4.5)) found.add(`pale (${ratio.toFixed(1)} : 1): ${name(e)}`)
  }
  return [...found]
})
