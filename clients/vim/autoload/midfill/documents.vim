vim9script
# Buffers as documents of the server, and their positions in the protocol.
#
# Every line of a buffer, including the last one, ends with a line end. A listener notes which lines were
# changed; their text is read when the changes are sent. Columns are UTF-16 code units.

# Of more than this, the server is told whole lines.
const MAX_CHARS = 10000

# By buffer: uri, version, lines (as the server knows them), the lines that were touched as a count of
# those above them and of those below (above is -1 if none were), count (lines after the last change
# that we were told of), and the listener's id.
var documents: dict<dict<any>> = {}

# Return the path of a file as a URI.
export def UriOf(path: string): string
  return 'file://' .. substitute(path, '[^A-Za-z0-9/._~-]', (m) => Percent(m[0]), 'g')
enddef

def Percent(char: string): string
  return range(len(char))->mapnew((_, i) => printf('%%%02X', char2nr(strpart(char, i, 1)) % 256))->join('')
enddef

# Return text for the server: without NUL, which Vim uses for line ends, and without invalid bytes.
def Clean(line: string): string
  return list2str(str2list(line))->substitute("\n", "\ufffd", 'g')
enddef

# Return the number of UTF-16 code units of a text.
export def Units(text: string): number
  return NumUnits(str2list(text))
enddef

def NumUnits(chars: list<number>): number
  var num_units = 0
  for char in chars
    num_units += char > 0xffff ? 2 : 1
  endfor
  return num_units
enddef

# Return the cursor as a position.
export def Cursor(): dict<number>
  const before = strpart(getline('.'), 0, col('.') - 1)
  return {line: line('.') - 1, character: Units(before)}
enddef

export def IsOpen(buf: number): bool
  return documents->has_key(string(buf))
enddef

export def Identifier(buf: number): dict<any>
  return {uri: documents[string(buf)].uri}
enddef

# Close all documents, because their server has ended.
export def Forget()
  for document in values(documents)
    listener_remove(document.listener)
  endfor
  documents = {}
enddef

# Open a document. Return the parameters of textDocument/didOpen.
export def Open(buf: number): dict<any>
  const name = bufname(buf) == '' ? 'untitled:' .. buf : UriOf(fnamemodify(bufname(buf), ':p'))
  final lines = getbufline(buf, 1, '$')->mapnew((_, line) => Clean(line))
  documents[string(buf)] = {
    uri: name,
    version: 1,
    lines: lines,
    above: -1,
    below: 0,
    count: len(lines),
    listener: listener_add((_, _, _, _, changes) => Touched(buf, changes), buf),
  }
  const text = lines->mapnew((_, line) => line .. "\n")->join('')
  const language = getbufvar(buf, '&filetype')
  return {textDocument: {uri: name, languageId: LANGUAGES->get(language, language), version: 1, text: text}}
enddef

# Language identifiers that differ from the file type.
const LANGUAGES = {cs: 'csharp', sh: 'shellscript', bash: 'shellscript', zsh: 'shellscript', tex: 'latex',
  typescriptreact: 'typescriptreact', javascriptreact: 'javascriptreact', text: 'plaintext'}

# Close a document. Return the parameters of textDocument/didClose.
export def Close(buf: number): dict<any>
  const document = remove(documents, string(buf))
  listener_remove(document.listener)
  return {textDocument: {uri: document.uri}}
enddef

# Compare the whole buffer at the next flush.
export def Reread(buf: number)
  if IsOpen(buf)
    documents[string(buf)]->extend({above: 0, below: 0, count: -1})
  endif
enddef

# Note the lines that a series of changes affects.
def Touched(buf: number, changes: list<dict<any>>)
  if !IsOpen(buf)
    return
  endif
  final document = documents[string(buf)]
  for change in changes
    const above = change.lnum - 1
    # The end of a change is a line number from before the change.
    const below = max([0, document.count - change.end + 1])
    if document.above < 0
      document.above = above
      document.below = below
    else
      document.above = min([document.above, above])
      document.below = min([document.below, below])
    endif
    document.count += change.added
  endfor
enddef

# Return the parameters of textDocument/didChange for the changes of a buffer; {} if there were none.
export def Changes(buf: number): dict<any>
  listener_flush(buf)
  final document = documents[string(buf)]
  if document.above < 0
    return {}
  endif
  const num_lines = getbufinfo(buf)[0].linecount
  var above: number = document.above
  var below: number = document.below
  if document.count != num_lines || above + below > min([num_lines, len(document.lines)])
    # The listener missed a change: compare the whole buffer.
    above = 0
    below = 0
  endif
  const last = len(document.lines) - below - 1
  const old: list<string> = above > last ? [] : document.lines[above : last]
  const new = getbufline(buf, above + 1, num_lines - below)->mapnew((_, line) => Clean(line))
  document.above = -1
  document.count = num_lines
  if old == new
    return {}
  endif
  document.version += 1
  if len(old) > 0
    remove(document.lines, above, last)
  endif
  extend(document.lines, new, above)
  return {
    textDocument: {uri: document.uri, version: document.version},
    contentChanges: [Difference(above, old, new)],
  }
enddef

# The change that makes the lines `new` of the lines `old`, which stand below `above` others: no more of
# them than differs, so that it ends where the user types.
def Difference(above: number, old: list<string>, new: list<string>): dict<any>
  const was = str2list(old->mapnew((_, line) => line .. "\n")->join(''))
  const is = str2list(new->mapnew((_, line) => line .. "\n")->join(''))
  var first = 0
  var num_same = 0
  if len(was) + len(is) < MAX_CHARS
    const shorter = min([len(was), len(is)])
    while first < shorter && was[first] == is[first]
      first += 1
    endwhile
    while num_same < shorter - first && was[-1 - num_same] == is[-1 - num_same]
      num_same += 1
    endwhile
  endif
  const range = {start: Position(above, was, first), end: Position(above, was, len(was) - num_same)}
  const end = len(is) - num_same
  return {range: range, text: first < end ? list2str(is[first : end - 1]) : ''}
enddef

# The position of an offset in the characters of lines that stand below `above` others.
def Position(above: number, chars: list<number>, offset: number): dict<number>
  const before = offset == 0 ? [] : chars[0 : offset - 1]
  const line_ends = count(before, 10)
  var start = len(before)
  while start > 0 && before[start - 1] != 10
    start -= 1
  endwhile
  const on_line: list<number> = start < len(before) ? before[start :] : []
  return {line: above + line_ends, character: NumUnits(on_line)}
enddef
