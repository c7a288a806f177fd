vim9script
# Keys of insert mode that keep their earlier meaning while there is no suggestion.

# For each mapped key: the keys to execute, when, and the keys with its earlier meaning.
var actions: list<dict<any>> = []

# Return a key sequence with the earlier meaning of a key: the user's global mapping, or the key itself.
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

# Map a key to a command that is executed while `Wants` returns true. '' maps none.
export def Map(key: string, command: string, Wants: func(): bool)
  if key == ''
    return
  endif
  const fallback = FallbackOf(key)
  add(actions, {keys: "\<Cmd>" .. command .. "\<CR>", Wants: Wants, fallback: fallback})
  execute printf('imap <special><silent><expr> %s midfill#keys#Pressed(%d)', key, len(actions) - 1)
enddef

# Return the keys to execute. The text is locked meanwhile, so this returns a command instead of executing it.
export def Pressed(number: number): string
  const action = actions[number]
  return action.Wants() ? action.keys : action.fallback
enddef
