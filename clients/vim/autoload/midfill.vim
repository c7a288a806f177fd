vim9script
# Ghost text: send requests, follow typing, accept suggestions. And the command :Midfill.
#
# A suggestion belongs to the position at which it was requested. While the text typed since then is a
# beginning of it, its rest is shown without a request. This happens in TextChangedI, before Vim draws, so that
# nothing flickers.

import autoload './midfill/config.vim'
import autoload './midfill/documents.vim'
import autoload './midfill/keys.vim' as mappings
import autoload './midfill/server.vim'

const INVOKED = 1
const AUTOMATIC = 2
const POPUP_MS = 2000

# Where the cursor is: buf, row, col (bytes before it), before, after, num_lines, tick. {} is nowhere.
var seen: dict<any> = {}
# What is on the screen: place, text, num_replaced closers after the cursor, pairs of openers and closers of the
# text (see Pairs), command. {} is nothing.
var shown: dict<any> = {}
# The buffer in which the suggestion is drawn.
var drawn_in = -1
# The pending request: place, id. {} is none.
var pending: dict<any> = {}
var timer = -1
var is_enabled = true

def Here(): dict<any>
  const line = getline('.')
  const col = col('.') - 1
  return {
    buf: bufnr(),
    row: line('.'),
    col: col,
    before: strpart(line, 0, col),
    after: strpart(line, col),
    num_lines: line('$'),
    tick: b:changedtick,
  }
enddef

# Return which closers of an item's text Vim may insert by itself, by a plugin: offsets in bytes of the opener, -1
# if it is before the text, and of the closer.
def Pairs(item: dict<any>, text: string): list<list<number>>
  const data: any = item->get('data', {})
  const sent: any = type(data) == v:t_dict ? data->get('closers', []) : []
  # The server counts code points.
  const Bytes = (offset: number): number => offset < 0 ? -1 : byteidxcomp(text, offset)
  return type(sent) != v:t_list ? [] : mapnew(sent, (_, pair: list<number>) => [Bytes(pair[0]), Bytes(pair[1])])
enddef

# Return the offsets, in a suggestion's text, of those of its closers that stand after the cursor once this many
# bytes of it are typed. [-1] if anything else does.
def Standing(suggestion: dict<any>, num_typed: number, after: string): list<number>
  const text: string = suggestion.text
  const pairs: list<list<number>> = copy(suggestion.pairs)->filter((_, pair) => pair[0] < num_typed && num_typed <= pair[1])
  const given = copy(pairs)->filter((_, pair) => pair[0] < 0)->mapnew((_, pair) => pair[1])
  final awaited = copy(pairs)->filter((_, pair) => pair[0] >= 0)->mapnew((_, pair) => pair[1])
  const behind = strpart(suggestion.place.after, suggestion.num_replaced - len(given))
  const num_new = len(after) - len(behind)
  if num_new < 0 || strpart(after, num_new) !=# behind
    return [-1]
  endif
  final offsets: list<number> = []
  # Vim may have closed some of what was typed, and other brackets not.
  for char in split(strpart(after, 0, num_new), '\zs')
    while !empty(awaited) && strpart(text, awaited[0], 1) !=# char && !(awaited[0] == len(text) && IsClosers(char))
      remove(awaited, 0)
    endwhile
    if empty(awaited)
      return [-1]
    endif
    add(offsets, remove(awaited, 0))
  endfor
  # One after the text stays where it is.
  return filter(offsets, (_, at) => at < len(text)) + given
enddef

def IsClosers(text: string): bool
  return text =~ '^[])}>"''`]*$'
enddef

# What of a suggestion is left at a place: its text, and where in it the closers are that stand after the cursor.
# The text is '' if it does not hold there.
def Rest(suggestion: dict<any>, place: dict<any>): dict<any>
  const none = {text: '', offsets: []}
  if empty(suggestion)
    return none
  endif
  const origin: dict<any> = suggestion.place
  const is_before = place.row < origin.row || (place.row == origin.row && place.col < origin.col)
  if place.buf != origin.buf || is_before || place.num_lines - origin.num_lines != place.row - origin.row
    return none
  endif
  final lines = getline(origin.row, place.row)
  lines[-1] = place.before
  const now = join(lines, "\n")
  const wanted = origin.before .. suggestion.text
  if len(now) >= len(wanted) || stridx(wanted, now) != 0
    return none
  endif
  # What was typed, over closers or not, and what the editor has closed at that, is all that may have changed.
  const num_typed = len(now) - len(origin.before)
  const offsets = Standing(suggestion, num_typed, place.after)
  if offsets == [-1]
    return none
  endif
  return {text: strpart(wanted, len(now)), offsets: mapnew(offsets, (_, at) => at - num_typed)}
enddef

# Return a text with tabs as spaces, as it looks from a column on: text properties ignore tab stops.
def ExpandTabs(text: string, column: number): string
  if stridx(text, "\t") < 0
    return text
  endif
  var expanded = ''
  for piece in split(text, '\t\zs')
    const body = substitute(piece, '\t$', '', '')
    expanded ..= body
    if body !=# piece
      expanded ..= repeat(' ', &tabstop - (column + strdisplaywidth(expanded)) % &tabstop)
    endif
  endfor
  return expanded
enddef

# Draw the rest of a suggestion at the cursor, around the closers that stand there already.
def Draw(place: dict<any>, rest: dict<any>)
  Undraw()
  drawn_in = place.buf
  const [first; below] = split(rest.text, "\n", true)
  var from = 0
  var col = place.col + 1
  var width = strdisplaywidth(place.before)
  for to in copy(rest.offsets)->filter((_, at) => at < len(first)) + [len(first)]
    if to > from
      const text = ExpandTabs(strpart(first, from, to - from), width)
      prop_add(place.row, col, {type: 'midfill', text: text})
      width += strdisplaywidth(text)
    endif
    from = to + 1
    col += 1
    width += 1
  endfor
  for under in below
    # A text must not be empty.
    const text = under == '' ? ' ' : ExpandTabs(under, 0)
    prop_add(place.row, 0, {type: 'midfill', text: text, text_align: 'below', text_wrap: 'truncate'})
  endfor
enddef

def Undraw()
  if drawn_in >= 0 && bufloaded(drawn_in)
    prop_remove({type: 'midfill', bufnr: drawn_in, all: true})
  endif
  drawn_in = -1
enddef

def CancelRequest()
  timer_stop(timer)
  if !empty(pending)
    if pending.id >= 0
      server.Cancel(pending.id)
    endif
    pending = {}
  endif
enddef

# Hide the suggestion and cancel the pending request.
def Clear()
  CancelRequest()
  if !empty(shown)
    shown = {}
    Undraw()
  endif
enddef

# Return true if ghost text may be shown now.
def CanShow(): bool
  return is_enabled && mode() =~ '^i' && !pumvisible() && !&paste && reg_executing() == ''
enddef

def IsAutomatic(): bool
  return config.Get('auto') && !empty(get(b:, 'midfill_enabled', true))
enddef

def Ask(kind: number)
  Clear()
  const place = Here()
  if !server.Serves(place.buf)
    return
  endif
  server.Flush(place.buf)
  final question: dict<any> = {place: place, id: -1}
  pending = question
  question.id = server.Request('textDocument/inlineCompletion', {
    textDocument: documents.Identifier(place.buf),
    position: documents.Cursor(),
    context: {triggerKind: kind},
  }, (result) => Answered(question, result))
enddef

def Answered(question: dict<any>, result: any)
  if pending isnot question
    return
  endif
  pending = {}
  const items: list<any> = type(result) == v:t_dict ? result->get('items', []) : type(result) == v:t_list ? result : []
  if empty(items) || !CanShow() || question.place != Here()
    return
  endif
  const item: dict<any> = items[0]
  const sent: string = type(item.insertText) == v:t_dict ? item.insertText.value : item.insertText
  const text = substitute(sent, "\r\n", "\n", 'g')
  var num_replaced = 0
  if item->has_key('range')
    # Behind the cursor a closer is one unit in every encoding.
    const [from, to] = [item.range.start, item.range.end]
    num_replaced = to.character - from.character
    # Ghost text can only add: an item that replaces more than what the editor has closed is not shown.
    if from.line != to.line || num_replaced < 0 || !IsClosers(strpart(question.place.after, 0, num_replaced))
      return
    endif
  endif
  const suggestion = {
    place: question.place,
    text: text,
    num_replaced: num_replaced,
    pairs: Pairs(item, text),
    command: item->get('command', {}),
  }
  const rest = Rest(suggestion, question.place)
  if rest.text != ''
    shown = suggestion
    Draw(question.place, rest)
  endif
enddef

# After a change of the text or the cursor: continue the suggestion, or request another one.
def Changed()
  if !CanShow()
    seen = {}
    Clear()
    return
  endif
  const place = Here()
  if place == seen
    return
  endif
  seen = place
  const rest = Rest(shown, place)
  if rest.text != ''
    Draw(place, rest)
    return
  endif
  Clear()
  if IsAutomatic() && server.Serves(place.buf)
    timer = timer_start(config.Get('debounce_ms'), (_) => {
      if seen is place && CanShow()
        Ask(AUTOMATIC)
      endif
    })
  endif
enddef

# When Vim waits for a key or changes its mode: hide a suggestion that may not be shown any more.
#
# Not every way out of insert mode triggers InsertLeave: CTRL-C, <Insert>, CTRL-R =, 'pastetoggle' do not.
def Settled()
  if !CanShow() && (!empty(shown) || !empty(pending) || !empty(seen))
    seen = {}
    Clear()
    # Vim may have drawn already.
    redraw
  endif
enddef

# Request a suggestion without a change of the text.
def Again()
  seen = {}
  Changed()
enddef

# White space, then a word or a run of other characters. In a string, \S matches a line end.
const WORD = '^[[:space:]]*\%(\k\+\|\%(\k\@![^[:space:]]\)\+\)'

# Return the first word of a text, the rest of its first line (or the next line if that is empty), or all of it.
def Piece(text: string, part: string): string
  if part == 'word'
    return matchstr(text, WORD) ?? text
  endif
  return part == 'line' ? matchstr(text, "^\n\\?[^\n]*") : text
enddef

# Return the suggestion at the cursor; '' if there is none.
export def Suggestion(): string
  return Rest(shown, Here()).text
enddef

# Insert the suggestion or its next 'word' or 'line'. Return true if there was one.
export def Accept(part = ''): bool
  const place = Here()
  const suggestion = shown
  const rest = Rest(suggestion, place)
  if rest.text == ''
    return false
  endif
  const piece = Piece(rest.text, part)
  const is_all = piece ==# rest.text
  Insert(place, piece, len(copy(rest.offsets)->filter((_, at) => at < len(piece))))
  if !is_all
    Changed()
    return true
  endif
  Clear()
  RunCommand(suggestion.command)
  return true
enddef

# Insert text at the cursor, in place of this many bytes after it.
def Insert(place: dict<any>, text: string, num_replaced: number)
  const lines = split(text, "\n", true)
  const after = strpart(place.after, num_replaced)
  # One undo reverts the accepted text, but not the text typed before.
  &undolevels = &undolevels
  if len(lines) == 1
    setline(place.row, place.before .. text .. after)
    cursor(place.row, place.col + len(text) + 1)
    return
  endif
  setline(place.row, place.before .. lines[0])
  append(place.row, lines[1 : -2] + [lines[-1] .. after])
  cursor(place.row + len(lines) - 1, len(lines[-1]) + 1)
enddef

# Ask the server to run an item's command, which reports that the item was accepted.
def RunCommand(command: dict<any>)
  if !empty(command)
    const params = {command: command.command, arguments: command->get('arguments', [])}
    server.Request('workspace/executeCommand', params, (_) => {
    })
  endif
enddef

# Dismiss the suggestion; the next key requests another one.
export def Dismiss()
  Clear()
enddef

# Request a suggestion, even where none is shown automatically.
export def Trigger()
  if CanShow()
    seen = Here()
    Ask(INVOKED)
  endif
enddef

# For 'omnifunc' or 'completefunc': the first line of the suggestion; the rest is inserted with it.
export def Complete(findstart: bool, base: string): any
  if findstart
    popup = PopupItem()
    return empty(popup) ? -3 : popup.start
  endif
  return empty(popup) ? [] : [popup.item]
enddef

# The item that Complete found.
var popup: dict<any> = {}

def PopupItem(): dict<any>
  const buf = bufnr()
  if !is_enabled || !server.Serves(buf)
    return {}
  endif
  server.Flush(buf)
  const params = {textDocument: documents.Identifier(buf), position: documents.Cursor()}
  const result = server.Ask('textDocument/completion', params, POPUP_MS)
  const items: list<any> = type(result) == v:t_dict ? result->get('items', []) : []
  if empty(items)
    return {}
  endif
  const text: string = items[0].textEdit.newText
  const range: dict<any> = items[0].textEdit.range
  const [first; below] = split(text, "\n", true)
  const before = strpart(getline('.'), 0, col('.') - 1)
  var start = len(before)
  while start > 0 && documents.Units(strpart(before, 0, start)) > range.start.character
    start -= 1
  endwhile
  const data = {
    rest: empty(below) ? '' : "\n" .. join(below, "\n"),
    # What the editor has closed by itself may be replaced.
    num_replaced: max([0, range.end.character - documents.Units(before)]),
    command: items[0]->get('command', {}),
  }
  const user_data = json_encode({midfill: data})
  const item = {word: first, menu: 'midfill', info: text, dup: 1, user_data: user_data}
  return first == '' ? {} : {start: start, item: item}
enddef

def Completed()
  const data: any = v:completed_item->get('user_data', '')
  if type(data) == v:t_string && data =~ '^{"midfill":'
    const item: dict<any> = json_decode(data).midfill
    # Vim has not done with the line yet.
    timer_start(0, (_) => {
      if item.rest != '' || item.num_replaced > 0
        Insert(Here(), item.rest, item.num_replaced)
      endif
      RunCommand(item.command)
    })
  endif
enddef

# The command

def Show(lines: list<string>)
  for line in lines
    echomsg line
  endfor
enddef

# Call Done with lines that explain the last answer for the buffer.
def Explain(Done: func(list<string>))
  if !server.Serves(bufnr())
    Done([printf('midfill is not active in this buffer (server: %s).', server.state)])
    return
  endif
  server.Request('midfill/explain', {textDocument: documents.Identifier(bufnr())},
    (result) => Done(type(result) == v:t_dict ? Explanation(result) : ['The server sent no explanation.']))
enddef

# Return a field of an answer if it has the type of `otherwise`, or else that: a newer server may differ.
def Typed(values: any, name: string, otherwise: any): any
  const value = type(values) == v:t_dict ? values->get(name, otherwise) : otherwise
  if type(otherwise) == v:t_float && type(value) == v:t_number
    return 1.0 * value
  endif
  return type(value) == type(otherwise) ? value : otherwise
enddef

def Explanation(result: dict<any>): list<string>
  final lines: list<string> = []
  const message: string = Typed(result, 'message', '')
  const reason: string = Typed(result, 'reason', '')
  const source: string = Typed(result, 'source', 'none')
  if message != ''
    add(lines, message)
  elseif reason != ''
    add(lines, printf('No suggestion: %s.', reason))
  elseif source == 'none'
    add(lines, 'No suggestion has been requested in this buffer yet.')
  else
    add(lines, printf('The last suggestion came from: %s.', source))
  endif
  if has_key(result, 'latencyMs') && result.latencyMs != v:null
    add(lines, printf('total: %.0f ms', Typed(result, 'latencyMs', 0.0)))
    for stage in Typed(result, 'stages', [])
      add(lines, printf('  %-16s%8.1f ms', Typed(stage, 'stage', '?'), Typed(stage, 'ms', 0.0)))
    endfor
  endif
  if Typed(result, 'promptTokens', 0) > 0
    add(lines, printf('prompt: %d tokens, %d of them cached; %d tokens generated',
      result.promptTokens, Typed(result, 'reusedTokens', 0), Typed(result, 'generatedTokens', 0)))
    for segment in Typed(result, 'segments', [])
      add(lines, printf('  %-16s%8d tokens', Typed(segment, 'source', '?'), Typed(segment, 'tokens', 0)))
    endfor
  endif
  for filter in Typed(result, 'filters', [])
    add(lines, printf('filter: %s (%+d characters)', Typed(filter, 'filter', '?'), Typed(filter, 'characters', 0)))
  endfor
  return lines
enddef

def Status()
  const lines = [
    printf('server: %s%s', server.state, server.version == '' ? '' : ', midfill ' .. server.version),
    printf('model: %s', server.model == '' ? 'unknown until the server is ready' : server.model),
    printf('suggestions: %s', is_enabled ? 'on' : 'off (:Midfill toggle)'),
    printf('this buffer: %s', server.Serves(bufnr()) ? 'active' : 'not active'),
  ]
  Explain((explained) => Show(lines + ['last answer: ' .. explained[0]]))
enddef

def Toggle()
  is_enabled = !is_enabled
  server.Notify('workspace/didChangeConfiguration', {settings: {midfill: {enabled: is_enabled}}})
  Clear()
  server.Say('suggestions are ' .. (is_enabled ? 'on' : 'off'))
  redrawstatus!
  Again()
enddef

def Log()
  new
  setlocal buftype=nofile bufhidden=wipe noswapfile nobuflisted
  setline(1, server.log)
  normal! G
enddef

const COMMANDS: dict<func> = {
  explain: () => Explain((lines) => Show(lines)),
  log: () => Log(),
  restart: () => server.Restart(),
  status: () => Status(),
  toggle: () => Toggle(),
}

export def Names(lead: string, _: string, _: number): list<string>
  return sort(keys(COMMANDS))->filter((_, name) => stridx(name, lead) == 0)
enddef

export def Run(name: string)
  if !has_key(COMMANDS, name)
    server.Say(printf('unknown command "%s"; known: %s', name, join(sort(keys(COMMANDS)), ', ')), 'ErrorMsg')
    return
  endif
  COMMANDS[name]()
enddef

# Return a short text for the status line; '' if midfill is not active in the buffer.
export def Statusline(): string
  if !is_enabled
    return 'midfill off'
  endif
  if server.state == 'ready'
    return !server.Serves(bufnr()) ? '' : empty(pending) ? 'midfill' : 'midfill …'
  endif
  if server.state == 'loading' && server.percentage >= 0
    return printf('midfill %d%%', server.percentage)
  endif
  return server.state == 'stopped' ? '' : 'midfill ' .. server.state
enddef

def IsVisible(): bool
  return Suggestion() != ''
enddef

# Start midfill. Called once, after all mappings of the user.
export def Start()
  if &encoding != 'utf-8'
    server.Say(printf("'encoding' must be utf-8, not %s", &encoding), 'ErrorMsg')
    return
  endif
  highlight default link MidfillSuggestion NonText
  prop_type_add('midfill', {highlight: 'MidfillSuggestion', combine: false})
  const chosen = config.Keys()
  for part in ['', '_word', '_line']
    const argument = part == '' ? '' : printf("'%s'", part[1 :])
    mappings.Map(chosen['accept' .. part], printf('call midfill#Accept(%s)', argument), IsVisible)
  endfor
  mappings.Map(chosen.dismiss, 'call midfill#Dismiss()', IsVisible)
  mappings.Map(chosen.trigger, 'call midfill#Trigger()', () => true)
  server.Watch(() => Again(), () => Clear())
  augroup midfill
    autocmd!
    autocmd TextChangedI,TextChangedP,CursorMovedI,CompleteChanged * Changed()
    autocmd InsertEnter * timer_start(0, (_) => Again())
    # Back from another mode within insert mode.
    autocmd ModeChanged [^i]*:i* timer_start(0, (_) => Again())
    autocmd ModeChanged i*:[^i]* Settled()
    autocmd SafeState,OptionSet * Settled()
    autocmd CompleteDone * Completed()
    autocmd InsertLeave,BufLeave,WinLeave * seen = {} | Clear()
    autocmd FileType,BufFilePost * server.Renew(str2nr(expand('<abuf>')))
    autocmd BufReadPost * documents.Reread(str2nr(expand('<abuf>')))
    autocmd BufWritePost * server.Saved(str2nr(expand('<abuf>')))
    autocmd BufUnload * server.Detach(str2nr(expand('<abuf>')))
    autocmd VimLeavePre * server.Leave()
  augroup END
  for info in getbufinfo({bufloaded: true})
    server.Attach(info.bufnr)
  endfor
enddef
