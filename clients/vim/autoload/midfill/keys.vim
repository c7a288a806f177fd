vim9script
# Keys of insert mode that do what they did before wherever there is no suggestion.

# Of each key of ours: what it does, when, and the keys that act as it did before.
var actions: list<dict<any>> = []

# A key sequence that acts as a key did before it was ours: the user's global mapping, or no mapping.
def FallbackOf(key: string): string
  const plug = printf('<Plug>(midfill-fallback-%d)', len(actions))
  const raw = eval(printf('"\%s"', plug))
  final map: dict<any> = maparg(key, 'i', false, true)
  if empty(map) || map.buffer
    execute printf('inoremap <special> %s %s', plug, key)
  else
    map.lhs = plug
    map.lhsraw = raw
    if has_key(map, 'lhsrawalt')
      remove(map, 'lhsrawalt')
    endif
    mapset('i', false, map)
  endif
  return raw
enddef

# Map a key to a command, for as long as `Wants` says so. '' is no key.
export def Map(key: string, command: string, Wants: func(): bool)
  if key == ''
    return
  endif
  const fallback = FallbackOf(key)
  add(actions, {keys: "\<Cmd>" .. command .. "\<CR>", Wants: Wants, fallback: fallback})
  execute printf('imap <special><silent><expr> %s midfill#keys#Pressed(%d)', key, len(actions) - 1)
enddef

# What a key stands for now. The text is locked meanwhile, so it is a command and not its effect.
export def Pressed(number: number): string
  const action = actions[number]
  return action.Wants() ? action.keys : action.fallback
enddef
