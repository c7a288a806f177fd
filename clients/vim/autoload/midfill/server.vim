vim9script
# The server process: one for all buffers, so that the model is in memory once.
#
# Knows the process, the protocol's messages and which buffers are attached; nothing about what is shown.

import autoload './config.vim'
import autoload './documents.vim'
import autoload './program.vim'

# Pauses before a crashed server is restarted; after the last one it stays off.
const BACK_OFF_MS = [250, 1000, 4000]
# A server that has run this long resets the count of crashes.
const RECOVERED_S = 600
const MAX_LOG_LINES = 2000

# stopped, missing, starting, loading, ready, failed, restarting or given up
export var state = 'stopped'
# Loading progress in per cent; -1 if unknown.
export var percentage = -1
export var model = ''
export var version = ''
export var log: list<string> = []

var job: any = v:null
var is_initialized = false
var started_s = 0
var deaths = 0
var is_expected = false
var folders: list<string> = []
var OnReady: func = () => {
}
var OnGone: func = () => {
}

# Set the functions to call when the model is ready, and when the server has ended.
export def Watch(Ready: func, Gone: func)
  OnReady = Ready
  OnGone = Gone
enddef

export def Say(message: string, highlight = 'None')
  execute 'echohl' highlight
  echomsg 'midfill: ' .. message
  echohl None
enddef

def Become(new: string)
  state = new
  redrawstatus!
enddef

def IsRunning(): bool
  return type(job) == v:t_job && job_status(job) == 'run'
enddef

# Return true if the server knows the buffer.
export def Serves(buf: number): bool
  return IsRunning() && is_initialized && documents.IsOpen(buf)
enddef

# Send a request, and call Done with its result or v:null. Return its number for Cancel.
export def Request(method: string, params: any, Done: func(any)): number
  const Answered = (_, message: dict<any>) => {
    Done(message->get('result', v:null))
  }
  const sent: any = ch_sendexpr(job, {method: method, params: params}, {callback: Answered})
  return type(sent) == v:t_dict ? sent->get('id', -1) : -1
enddef

# Send a request and wait. Return the result; v:null if there is no answer in time.
export def Ask(method: string, params: any, timeout_ms: number): any
  const answer: any = ch_evalexpr(job, {method: method, params: params}, {timeout: timeout_ms})
  return type(answer) == v:t_dict ? answer->get('result', v:null) : v:null
enddef

export def Notify(method: string, params: any)
  if IsRunning()
    ch_sendexpr(job, {method: method, params: params})
  endif
enddef

# Cancel a request.
export def Cancel(id: number)
  Notify('$/cancelRequest', {id: id})
enddef

# Send the changes of a buffer to the server.
export def Flush(buf: number)
  const changes = documents.Changes(buf)
  if !empty(changes)
    Notify('textDocument/didChange', changes)
  endif
enddef

def Open(buf: number)
  const path = fnamemodify(bufname(buf), ':p')
  const root = finddir('.git', fnamemodify(path, ':h') .. ';')
  if root != ''
    const folder = fnamemodify(root, ':p:h:h')
    const uri = documents.UriOf(folder)
    if index(folders, uri) < 0
      add(folders, uri)
      const added = {uri: uri, name: fnamemodify(folder, ':t')}
      Notify('workspace/didChangeWorkspaceFolders', {event: {added: [added], removed: []}})
    endif
  endif
  Notify('textDocument/didOpen', documents.Open(buf))
enddef

def IsWanted(buf: number): bool
  return bufloaded(buf) && getbufvar(buf, '&buftype') == '' && getbufvar(buf, '&filetype') != ''
    && config.IsWanted(getbufvar(buf, '&filetype'))
enddef

# Attach a buffer if its file type is wanted. Start the server if none is running.
export def Attach(buf: number)
  if documents.IsOpen(buf) || !IsWanted(buf) || index(['given up', 'restarting'], state) >= 0
    return
  endif
  if IsRunning()
    if is_initialized
      Open(buf)
    endif
    return
  endif
  const command: list<string> = config.Get('command')
  const found = empty(command) ? '' : program.Find(command[0])
  if found == ''
    if state != 'missing'
      Become('missing')
      Say(printf("cannot run %s. Install the server (%s), or set its path: let g:midfill_command = ['/path/to/midfill', 'serve']",
        string(get(command, 0, '')), program.INSTALL), 'ErrorMsg')
    endif
    return
  endif
  Start([found] + command[1 :])
enddef

# Detach a buffer.
export def Detach(buf: number)
  if documents.IsOpen(buf)
    Notify('textDocument/didClose', documents.Close(buf))
  endif
enddef

# Reopen a buffer after a change of its name or file type.
export def Renew(buf: number)
  Detach(buf)
  Attach(buf)
enddef

export def Saved(buf: number)
  if Serves(buf)
    Flush(buf)
    Notify('textDocument/didSave', {textDocument: documents.Identifier(buf)})
  endif
enddef

def AttachAll()
  for info in getbufinfo({bufloaded: true})
    Attach(info.bufnr)
  endfor
enddef

def Start(command: list<string>)
  Become('starting')
  started_s = localtime()
  is_initialized = false
  is_expected = false
  folders = []
  log = []
  const mine = job_start(command, extendnew(program.OPTIONS, {
    in_mode: 'lsp',
    out_mode: 'lsp',
    err_mode: 'nl',
    noblock: 1,
    out_cb: (_, message) => Heard(message),
    err_cb: (_, line) => {
      add(log, line)
      if len(log) > MAX_LOG_LINES
        remove(log, 0)
      endif
    },
    exit_cb: (old, status) => Ended(old, status),
  }))
  job = mine
  if job_status(mine) == 'fail'
    Become('failed')
    Say('cannot start the server: ' .. join(command), 'ErrorMsg')
    return
  endif
  const capabilities = {
    general: {positionEncodings: ['utf-16']},
    window: {workDoneProgress: true},
    workspace: {workspaceFolders: true},
    textDocument: {
      synchronization: {didSave: true},
      completion: {completionItem: {snippetSupport: false}},
      inlineCompletion: {dynamicRegistration: false},
    },
  }
  const params = {
    processId: getpid(),
    clientInfo: {name: 'Vim', version: printf('%d.%d.%d', v:version / 100, v:version % 100, v:versionlong % 10000)},
    rootUri: v:null,
    capabilities: capabilities,
    initializationOptions: config.Get('settings'),
  }
  Request('initialize', params, (result) => Initialized(mine, result))
enddef

def Initialized(mine: job, result: any)
  if mine != job
    return
  endif
  if type(result) != v:t_dict
    Become('failed')
    Say('the server did not start; :Midfill log may show why.', 'ErrorMsg')
    return
  endif
  version = result->get('serverInfo', {})->get('version', '')
  is_initialized = true
  Notify('initialized', {})
  AttachAll()
enddef

# Answer a request of the server. Its id may be a string, which ch_sendexpr() of Vim 9.0 refuses.
def Answer(answer: dict<any>)
  const body = json_encode(extendnew(answer, {jsonrpc: '2.0'}))
  ch_sendraw(job, printf("Content-Length: %d\r\n\r\n%s", len(body), body))
enddef

# Handle a request or notification of the server.
def Heard(message: dict<any>)
  const method = message->get('method', '')
  if message->has_key('id')
    if method == 'window/workDoneProgress/create'
      Answer({id: message.id, result: v:null})
    elseif method != ''
      Answer({id: message.id, error: {code: -32601, message: 'Unknown method'}})
    endif
  elseif method == '$/progress'
    Progressed(message.params.value)
  elseif method == 'window/showMessage'
    echomsg message.params.message
  endif
enddef

# Follow the loading of the model.
def Progressed(value: dict<any>)
  if value.kind == 'end'
    percentage = -1
    Become(value->get('message', '') == 'failed' ? 'failed' : 'ready')
    if state == 'ready'
      OnReady()
    endif
    return
  endif
  const title: string = value->get('title', '')
  if value.kind == 'begin' && title =~ '^midfill: '
    model = title[len('midfill: ') :]
  endif
  percentage = value->get('percentage', percentage)
  Become('loading')
enddef

def Ended(old: job, status: number)
  if old != job
    return
  endif
  const signal: string = job_info(old)->get('termsig', '')
  const how = signal == '' ? printf('status %d', status) : printf('signal %s', signal)
  job = v:null
  percentage = -1
  documents.Forget()
  OnGone()
  if is_expected
    Become('stopped')
    return
  endif
  if localtime() - started_s > RECOVERED_S
    deaths = 0
  endif
  deaths += 1
  if deaths > len(BACK_OFF_MS)
    Become('given up')
    Say(printf('the server crashed again (%s) and stays off. :Midfill log may show why; :Midfill restart restarts it.', how),
      'ErrorMsg')
    return
  endif
  Become('restarting')
  if deaths == 1
    Say(printf('the server crashed (%s) and is being restarted. :Midfill log may show why.', how), 'WarningMsg')
  endif
  timer_start(BACK_OFF_MS[deaths - 1], (_) => {
    if state == 'restarting'
      Become('stopped')
      AttachAll()
    endif
  })
enddef

# Restart the server.
export def Restart()
  const old = job
  deaths = 0
  # Ignore all further messages of the old server.
  job = v:null
  if type(old) == v:t_job && job_status(old) == 'run'
    # The server ends when its input is closed.
    ch_close(old)
    job_stop(old)
    documents.Forget()
    OnGone()
  endif
  Become('stopped')
  AttachAll()
enddef

# End the server when Vim ends.
export def Leave()
  is_expected = true
  if IsRunning() && is_initialized
    Notify('exit', {})
  endif
enddef
