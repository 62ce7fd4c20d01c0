-- Takes the lock KEYS[1], whose queue is KEYS[2], for the token ARGV[1] and ARGV[2] milliseconds, if
-- nobody has it and nobody waits for it. ARGV[3] fencing tokens come with it, from the counter
-- KEYS[3].
-- Answers the last of them, or nil if it was not taken.
if redis.call('GET', KEYS[2]) or not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return false
end
local last = redis.pcall('INCRBY', KEYS[3], ARGV[3])
if type(last) ~= 'number' then redis.call('DEL', KEYS[1]) end
return last
