-- Gives up what the token ARGV[1] has of the lock KEYS[1]: the lock itself, or a place in its queue,
-- KEYS[2]. A lock goes to the first in the queue.
-- Answers 0 if the lock was not the token's, 1 if it was. If the token ARGV[2] wants the lock again,
-- for ARGV[3] milliseconds and with ARGV[4] fencing tokens, and somebody else has it now, that token
-- stands at the end of the queue, which is kept for ARGV[5] milliseconds; then the answer is
-- {milliseconds that the new holder has, the server's time}. KEYS[3] is the fencing counter.
-- With ARGV[2] 'quiet' the queue stays as it is, and a lock goes to nobody.
local queue = found[2]
if not is_of(found[1], ARGV[1]) then
  if queue and ARGV[2] ~= 'quiet' then leave(queue, ARGV[1]) end
  return 0
end
-- First of all that which also a full server does: after it, the rest cannot fail for want of memory.
redis.call('DEL', KEYS[1])
if not queue or ARGV[2] == 'quiet' then return 1 end
if ARGV[2] then queue = queue .. ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. ARGV[4] .. '\n' end
local ttl, seconds, micros = pass_on(queue, ARGV[2], ARGV[1], ARGV[5])
if not ttl then
  -- All others were gone.
  redis.call('DEL', KEYS[2])
  return 1
end
if ARGV[2] then return { ttl, seconds, micros } end
return 1
