vim9script
# The options, and their defaults.

# Options are variables: g:midfill_command and so on.
const DEFAULTS: dict<any> = {
  # Command that starts the server; arguments of `midfill serve` may follow.
  command: ['midfill', 'serve'],
  # Settings of the server, as in its config.toml.
  settings: {},
  # File types that get suggestions; '*' is all others.
  filetypes: {'*': true, gitrebase: false, help: false, netrw: false},
  # Show suggestions while typing.
  auto: true,
  # Milliseconds without a key before a request is sent.
  debounce_ms: 15,
}

# Keys of insert mode: g:midfill_keys. '' maps none.
const KEYS: dict<string> = {
  accept: '<Tab>',
  accept_word: '<C-Right>',
  accept_line: '<M-Right>',
  dismiss: '<C-]>',
  trigger: '<C-G>m',
}

export def Get(name: string): any
  const value = get(g:, 'midfill_' .. name, DEFAULTS[name])
  if type(value) != type(DEFAULTS[name])
    throw printf('midfill: g:midfill_%s must be a %s, not %s', name, typename(DEFAULTS[name]), string(value))
  endif
  return value
enddef

export def Keys(): dict<string>
  const chosen: dict<any> = get(g:, 'midfill_keys', {})
  for [name, key] in items(chosen)
    if !has_key(KEYS, name) || type(key) != v:t_string
      throw printf('midfill: g:midfill_keys has %s for "%s"; known: %s, each a string',
        string(key), name, join(sort(keys(KEYS)), ', '))
    endif
  endfor
  return extendnew(KEYS, chosen)
enddef

export def IsWanted(filetype: string): bool
  const filetypes: dict<any> = extendnew(DEFAULTS.filetypes, Get('filetypes'))
  return !empty(filetypes->get(filetype, filetypes['*']))
enddef

# Return the names of the options, without g:midfill_.
export def Names(): list<string>
  return sort(keys(DEFAULTS) + ['keys'])
enddef
